-- Looks for what is late in a queue. ARGV: queue, limit, spare_leases (0 | 1).
-- Answers {jobs whose lease has expired, jobs that wait past their deadline}.
local queue, limit, spare_leases = ARGV[5], tonumber(ARGV[6]), ARGV[7] == '1'

local function up_to_now(key) return redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, limit) end

return { spare_leases and {} or up_to_now(running_key(queue)), up_to_now(deadlines_key(queue)) }

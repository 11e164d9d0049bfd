-- Looks for what has stalled in a queue. ARGV: queue, unclaimed_after_ms, limit, spare_leases (0 | 1).
-- Answers {jobs whose lease has expired, jobs that wait past their deadline, jobs to send}; the last wait unclaimed or
-- have waited for their retry, and count as sent now, so that they are named once per period.
local queue, unclaimed_after_ms, limit, spare_leases = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8] == '1'

local function up_to(key, ms) return redis.call('ZRANGEBYSCORE', key, '-inf', ms, 'LIMIT', 0, limit) end

local expired = spare_leases and {} or up_to(running_key(queue), now)
local late = up_to(deadlines_key(queue), now)
local to_send = up_to(sent_key(queue), now - unclaimed_after_ms)
for _, job_id in ipairs(up_to(delayed_key(queue), now)) do
  redis.call('ZREM', delayed_key(queue), job_id)
  table.insert(to_send, job_id)
end
for _, job_id in ipairs(to_send) do redis.call('ZADD', sent_key(queue), now, job_id) end
forget_if_empty(queue)
return { expired, late, to_send }

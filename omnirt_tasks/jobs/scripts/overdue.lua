-- Looks for what has stalled in a queue. ARGV: queue, unclaimed_after_ms, limit. Answers {jobs whose lease has expired,
-- jobs that wait unclaimed}; the latter count as sent now, and so are named once per period.
local queue, unclaimed_after_ms, limit = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])

local expired = redis.call('ZRANGEBYSCORE', running_key(queue), '-inf', now, 'LIMIT', 0, limit)
local unclaimed = redis.call('ZRANGEBYSCORE', sent_key(queue), '-inf', now - unclaimed_after_ms, 'LIMIT', 0, limit)
for _, job_id in ipairs(unclaimed) do redis.call('ZADD', sent_key(queue), now, job_id) end
forget_if_empty(queue)
return { expired, unclaimed }

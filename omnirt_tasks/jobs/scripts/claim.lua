-- Begins the next attempt. ARGV: token, lease_ttl_ms, worker_id, worker_id as JSON, execution_mode or "".
-- Answers the whole record, or nil when there is nothing to do.
local token, lease_ttl_ms, worker_id, worker_json, mode = ARGV[5], tonumber(ARGV[6]), ARGV[7], ARGV[8], ARGV[9]

local job = load()
if not job then return nil end
if held(job, token) then return redis.call('HGETALL', job_key) end -- the answer was lost on its way
if job.state == 'running' then
  if tonumber(job.lease_expires_at_ms) > now then return nil end
  release(job, '"lease_expired"')
elseif job.state == 'queued' and job.cancel_requested then
  finish(job, 'cancelled', 'job_cancelled', '{}')
end
if job.state ~= 'queued' then return nil end

if mode ~= '' then
  job.execution_mode = mode
  redis.call('HSET', job_key, 'execution_mode', mode)
end
enter(job, 'running')
local attempt = redis.call('HINCRBY', job_key, 'attempt', 1)
local lease_expires_at_ms = now + lease_ttl_ms
redis.call('HSET', job_key, 'token', token, 'worker_id', worker_id, 'phase', 'waiting', 'started_at_ms', now,
  'lease_expires_at_ms', lease_expires_at_ms)
redis.call('ZADD', running_key(job.queue), lease_expires_at_ms, id)
append('job_started', '"job"', '{"attempt":' .. attempt .. ',"worker_id":' .. worker_json .. '}')
return redis.call('HGETALL', job_key)

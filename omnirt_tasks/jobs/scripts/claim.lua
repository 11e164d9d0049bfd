-- Begins the next attempt. ARGV: token, lease_ttl_ms, worker_id, worker_id as JSON, execution_mode or "", alone (0 | 1),
-- then the queues whose jobs may be claimed ("*": any).
-- Answers the whole record, nil when there is nothing to do, "must run alone", or "awaited" when another worker waits
-- to give it a device to itself.
local token, lease_ttl_ms, worker_id, worker_json, mode = ARGV[5], tonumber(ARGV[6]), ARGV[7], ARGV[8], ARGV[9]
local alone = ARGV[10] == '1'

local function served(queue)
  for i = 11, #ARGV do
    if ARGV[i] == queue or ARGV[i] == '*' then return true end
  end
  return false
end

local job = load(id)
if not job or job.parts or not served(job.queue) then return nil end
if held(job, token) then return redis.call('HGETALL', job.key) end -- the answer was lost on its way
if job.state == 'queued' and job.cancel_requested then
  cancel(job)
elseif job.state == 'queued' and passed(job.deadline_at_ms) then
  fail(job, TIMED_OUT)
end
if job.state ~= 'queued' then return nil end
if job.not_before_ms and not passed(job.not_before_ms) then return nil end
if job.avoided_worker == worker_id and not passed(job.avoided_until_ms) then
  redis.call('ZADD', sent_key(job.queue), 0, id) -- its message is gone now: the next round sends it again
  return nil
end
if job.runs_alone and not alone then
  if job.awaited_by and job.awaited_by ~= worker_id and not passed(job.awaited_until_ms) then return 'awaited' end
  redis.call('HSET', job.key, 'awaited_by', worker_id, 'awaited_until_ms', now + AWAITED_MS)
  return 'must run alone'
end

local function note_mode(of)
  if mode == '' then return end
  of.execution_mode = mode
  redis.call('HSET', of.key, 'execution_mode', mode)
end

note_mode(job)
enter(job, 'running')
local attempt = redis.call('HINCRBY', job.key, 'attempt', 1)
local lease_expires_at_ms = now + lease_ttl_ms
redis.call('HSET', job.key, 'token', token, 'worker_id', worker_id, 'phase', 'waiting', 'started_at_ms', now,
  'lease_expires_at_ms', lease_expires_at_ms)
if alone then redis.call('HSET', job.key, 'alone', 1) end
redis.call('ZADD', running_key(job.queue), lease_expires_at_ms, id)

local started = '{"attempt":' .. attempt .. ',"worker_id":' .. worker_json .. '}'
local whole = job.whole
if whole then
  if whole.state == 'queued' then
    note_mode(whole)
    enter(whole, 'running')
    redis.call('HSET', whole.key, 'phase', 'waiting', 'started_at_ms', now)
    append(whole, 'job_started', '"job"', started)
  end
  append(job, 'part_started', '"job"', started)
  follow(whole)
else
  append(job, 'job_started', '"job"', started)
end
return redis.call('HGETALL', job.key)

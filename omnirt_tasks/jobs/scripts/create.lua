-- Writes a new job. ARGV: queue, owner, queue_limit (-1: none), queues_max (-1: none), task, model, event data,
-- deadline_ms from now (-1: none), then of its idempotency key digest ("": none), fingerprint, ttl_ms; then the record's
-- further fields as name, value pairs.
-- Answers {"created", now, position}, {"exists", id, the whole record} or {"full" | "too many queues" | "mismatch"}.
local queue, owner, queue_limit, queues_max = ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local deadline_ms, digest, fingerprint, key_ttl_ms = tonumber(ARGV[12]), ARGV[13], ARGV[14], tonumber(ARGV[15])

if digest ~= '' then
  local known = redis.call('HMGET', idempotency_key(owner, digest), 'job', 'fingerprint')
  local record = known[1] and redis.call('HGETALL', prefix .. ':job:' .. known[1]) or {}
  if #record > 0 then
    if known[2] ~= fingerprint then return { 'mismatch' } end
    return { 'exists', known[1], record }
  end
end
if redis.call('EXISTS', job_key) == 1 then return { 'exists', id, redis.call('HGETALL', job_key) } end
if queue_limit >= 0 and redis.call('ZCARD', waiting_key(queue)) >= queue_limit then return { 'full' } end
if queues_max >= 0 and redis.call('SISMEMBER', queues_key, queue) == 0 and redis.call('SCARD', queues_key) >= queues_max then
  for _, name in ipairs(redis.call('SMEMBERS', queues_key)) do forget_if_empty(name) end
  if redis.call('SCARD', queues_key) >= queues_max then return { 'too many queues' } end
end

local job = { queue = queue, task = ARGV[9], model = ARGV[10], serial = redis.call('INCR', prefix .. ':serial') }
redis.call('HSET', job_key, 'state', 'queued', 'queue', queue, 'owner', owner, 'task', job.task, 'model', job.model,
  'serial', job.serial, 'attempt', 0, 'enqueued_at_ms', now, unpack(ARGV, 16))
if deadline_ms >= 0 then
  job.deadline_at_ms = now + deadline_ms
  redis.call('HSET', job_key, 'deadline_at_ms', job.deadline_at_ms)
end
if digest ~= '' then
  local key = idempotency_key(owner, digest)
  redis.call('HSET', job_key, 'idempotency', digest)
  redis.call('HSET', key, 'job', id, 'fingerprint', fingerprint)
  redis.call('PEXPIRE', key, key_ttl_ms)
end
redis.call('ZADD', owner_key(owner), job.serial, id)
wait_in_queue(job, 0)
count(job, 'queued')
append('job_enqueued', '"job"', ARGV[11])
return { 'created', now, redis.call('ZCARD', waiting_key(queue)) } -- the latest comes last

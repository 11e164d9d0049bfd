-- Writes a new job, with its parts where it is split. ARGV: queue, owner, queue_limit (-1: none), queues_max (-1: none),
-- task, model, priority, event data, deadline_ms from now (-1: none), of its idempotency key digest ("": none),
-- fingerprint, ttl_ms; the number of parts; then of the record, and of each part's, twice the number of its further
-- fields, and these as names and values in turn.
-- Answers {"created", now, position}, {"exists", id, the whole record} or {"full" | "too many queues" | "mismatch"}.
local queue, owner, queue_limit, queues_max = ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local task, model, priority, told, deadline_ms = ARGV[9], ARGV[10], ARGV[11], ARGV[12], tonumber(ARGV[13])
local digest, fingerprint, key_ttl_ms, parts = ARGV[14], ARGV[15], ARGV[16], tonumber(ARGV[17])

if digest ~= '' then
  local known = redis.call('HMGET', idempotency_key(owner, digest), 'job', 'fingerprint')
  local record = known[1] and redis.call('HGETALL', job_key(known[1])) or {}
  if #record > 0 then
    if known[2] ~= fingerprint then return { 'mismatch' } end
    return { 'exists', known[1], record }
  end
end
if redis.call('EXISTS', job_key(id)) == 1 then return { 'exists', id, redis.call('HGETALL', job_key(id)) } end
if queue_limit >= 0 and redis.call('ZCARD', waiting_key(queue)) >= queue_limit then return { 'full' } end
if queues_max >= 0 and redis.call('SISMEMBER', queues_key, queue) == 0 and redis.call('SCARD', queues_key) >= queues_max then
  for _, name in ipairs(redis.call('SMEMBERS', queues_key)) do forget_if_empty(name) end
  if redis.call('SCARD', queues_key) >= queues_max then return { 'too many queues' } end
end

local next_field = 18
local function write(job_id)
  local key, last_field = job_key(job_id), next_field + ARGV[next_field]
  redis.call('HSET', key, 'state', 'queued', 'queue', queue, 'owner', owner, 'task', task, 'model', model,
    'serial', redis.call('INCR', serial_key), 'attempt', 0, 'enqueued_at_ms', now, 'priority', priority,
    unpack(ARGV, next_field + 1, last_field))
  if deadline_ms >= 0 then redis.call('HSET', key, 'deadline_at_ms', now + deadline_ms) end
  next_field = last_field + 1
  return load(job_id)
end

local job = write(id)
if digest ~= '' then
  local key = idempotency_key(owner, digest)
  redis.call('HSET', job.key, 'idempotency', digest)
  redis.call('HSET', key, 'job', id, 'fingerprint', fingerprint)
  redis.call('PEXPIRE', key, key_ttl_ms)
end
redis.call('ZADD', owner_key(owner), job.serial, id)
count(job, 'queued')
append(job, 'job_enqueued', '"job"', told)
if parts == 0 then wait_in_queue(job, 0) end
for number = 0, parts - 1 do wait_in_queue(write(id .. '.' .. number), 0) end
local first = parts == 0 and id or id .. '.0'
return { 'created', now, redis.call('ZRANK', waiting_key(queue), first) + 1 }

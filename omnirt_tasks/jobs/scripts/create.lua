-- Writes a new job. ARGV: queue, owner, queue_limit (-1: none), queues_max (-1: none), task, model, event data, then
-- the record's further fields as name, value pairs.
-- Answers {"created" | "exists" | "full" | "too many queues", now, position}.
local queue, owner, queue_limit, queues_max = ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])

if redis.call('EXISTS', job_key) == 1 then return { 'exists', now } end
if queue_limit >= 0 and redis.call('ZCARD', waiting_key(queue)) >= queue_limit then return { 'full', now } end
if queues_max >= 0 and redis.call('SISMEMBER', queues_key, queue) == 0 and redis.call('SCARD', queues_key) >= queues_max then
  for _, name in ipairs(redis.call('SMEMBERS', queues_key)) do forget_if_empty(name) end
  if redis.call('SCARD', queues_key) >= queues_max then return { 'too many queues', now } end
end

local job = { queue = queue, task = ARGV[9], model = ARGV[10], serial = redis.call('INCR', prefix .. ':serial') }
redis.call('HSET', job_key, 'state', 'queued', 'queue', queue, 'owner', owner, 'task', job.task, 'model', job.model,
  'serial', job.serial, 'attempt', 0, 'enqueued_at_ms', now, unpack(ARGV, 12))
redis.call('ZADD', owner_key(owner), job.serial, id)
wait_in_queue(job)
count(job, 'queued')
append('job_enqueued', '"job"', ARGV[11])
return { 'created', now, redis.call('ZCARD', waiting_key(queue)) } -- the latest comes last

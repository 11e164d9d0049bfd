-- Writes a new job. ARGV: queue, owner, queue_limit (-1: none), task, model, event data, then the record's further
-- fields as name, value pairs. Answers {"created" | "exists" | "full", now, position}.
local queue, owner, queue_limit = ARGV[5], ARGV[6], tonumber(ARGV[7])

if redis.call('EXISTS', job_key) == 1 then return { 'exists', now } end
if queue_limit >= 0 and redis.call('ZCARD', waiting_key(queue)) >= queue_limit then return { 'full', now } end

local job = { queue = queue, task = ARGV[8], model = ARGV[9], serial = redis.call('INCR', prefix .. ':serial') }
redis.call('HSET', job_key, 'state', 'queued', 'queue', queue, 'owner', owner, 'task', job.task, 'model', job.model,
  'serial', job.serial, 'attempt', 0, 'enqueued_at_ms', now, unpack(ARGV, 11))
redis.call('ZADD', owner_key(owner), job.serial, id)
wait_in_queue(job)
count(job, 'queued')
append('job_enqueued', '"job"', ARGV[10])
return { 'created', now, redis.call('ZCARD', waiting_key(queue)) } -- the latest comes last

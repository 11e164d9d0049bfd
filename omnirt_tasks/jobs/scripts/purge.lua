-- Removes a job and every entry that leads to it. One that is not over ends as cancelled, so that watchers learn of it.
local job = load()
if job then
  if not over(job) then
    finish(job, 'cancelled', 'job_cancelled', '{}')
    redis.call('PUBLISH', prefix .. ':cancel', id)
  end
  redis.call('ZREM', owner_key(job.owner), id)
  redis.call('ZREM', dead_key(job.owner), id)
  if job.idempotency then
    local key = idempotency_key(job.owner, job.idempotency)
    if redis.call('HGET', key, 'job') == id then redis.call('DEL', key) end -- it may stand for a later job by now
  end
end
redis.call('ZREM', finished_key, id)
redis.call('DEL', job_key, log_key)

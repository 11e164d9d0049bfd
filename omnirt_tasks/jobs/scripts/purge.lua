-- Removes a job and every entry that leads to it. One that is not over ends as cancelled, so that watchers learn of it.
local job = load()
if job then
  if not over(job) then
    finish(job, 'cancelled', 'job_cancelled', '{}')
    redis.call('PUBLISH', prefix .. ':cancel', id)
  end
  redis.call('ZREM', owner_key(job.owner), id)
end
redis.call('ZREM', finished_key, id)
redis.call('DEL', job_key, log_key)

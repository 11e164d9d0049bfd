-- Removes a job and every entry that leads to it. One that is not over ends as cancelled, so that watchers learn of it.
-- A part goes with its whole job alone.
local job = load(id)
if job and job.whole then return end
if job then
  for _, part in ipairs(job.parts and open_parts(job) or {}) do
    if part.state == 'running' then redis.call('PUBLISH', cancel_channel, part.id) end
    finish_alone(part, 'cancelled')
  end
  if not over(job) then
    finish_alone(job, 'cancelled', '{}')
    redis.call('PUBLISH', cancel_channel, id)
  end
  redis.call('ZREM', owner_key(job.owner), id)
  redis.call('ZREM', dead_key(job.owner), id)
  if job.idempotency then
    local key = idempotency_key(job.owner, job.idempotency)
    if redis.call('HGET', key, 'job') == id then redis.call('DEL', key) end -- it may stand for a later job by now
  end
  for number = 0, (job.parts or 0) - 1 do redis.call('DEL', part_key(job, number)) end
end
redis.call('ZREM', finished_key, id)
redis.call('DEL', job_key(id), log_key(id))

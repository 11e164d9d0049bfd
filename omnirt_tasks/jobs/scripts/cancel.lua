-- Cancels a queued job, asks the holder of a running one. Answers a CancelOutcome, or nil for an unknown job.
local job = load()
if not job then return nil end
if job.call == call then return job.answer end
if over(job) then return 'already_finished' end
if job.state == 'running' then
  redis.call('HSET', job_key, 'cancel_requested', 1)
  redis.call('PUBLISH', prefix .. ':cancel', id)
  return answer('requested')
end
redis.call('HSET', job_key, 'cancel_requested', 1)
finish(job, 'cancelled', 'job_cancelled', '{}')
return answer('cancelled')

-- Cancels a queued job, asks the holder of a running one. Answers a CancelOutcome, or nil for an unknown job.
local job = load(id)
if not job or job.whole then return nil end
if job.call == call then return job.answer end
if over(job) then return 'already_finished' end
redis.call('HSET', job.key, 'cancel_requested', 1)
if job.state == 'running' and not job.parts then
  redis.call('PUBLISH', cancel_channel, id)
  return answer(job, 'requested')
end
return answer(job, cancel(job) and 'cancelled' or 'requested')

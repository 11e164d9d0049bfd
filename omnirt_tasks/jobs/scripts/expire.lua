-- Acts on a time that has passed: ends the attempt of a job whose lease has expired, fails one that waits past its
-- deadline. Answers the job's state after that and its priority, or nil when nothing was to be done.
local job = load(id)
if not job then return nil end
if job.call == call then return job.answer end
if job.state == 'running' and passed(job.lease_expires_at_ms) then
  expire(job)
elseif job.state == 'queued' and passed(job.deadline_at_ms) then
  fail(job, TIMED_OUT)
else
  return nil
end
return answer(job, job.state .. ' ' .. job.priority)

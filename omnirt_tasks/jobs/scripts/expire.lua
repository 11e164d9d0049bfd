-- Ends the attempt of a job whose lease has expired. Answers its queue if it waits again, else nil.
local job = load()
if not job or job.state ~= 'running' or tonumber(job.lease_expires_at_ms) > now then return nil end
release(job, '"lease_expired"')
return job.state == 'queued' and job.queue or nil

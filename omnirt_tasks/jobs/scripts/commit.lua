-- Ends the job with its attempt's outcome. ARGV: token, state, event, event data, execution_mode or "", field and
-- value of the outcome ("result" or "error", or both ""). Answers "lost" or "done".
local token, state, event, data, mode, field, value = unpack(ARGV, 5, 11)

local job = load()
if job and job.call == call then return job.answer end
if not held(job, token) then return 'lost' end
if mode ~= '' then job.execution_mode = mode end
finish(job, state, event, data)
if mode ~= '' then redis.call('HSET', job_key, 'execution_mode', mode) end
if field ~= '' then redis.call('HSET', job_key, field, value) end
return answer('done')

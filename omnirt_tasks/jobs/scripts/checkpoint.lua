-- Notes where the next attempt can go on. ARGV: token, name, step. Answers "lost" or "done".
local token, name, step = ARGV[5], ARGV[6], ARGV[7]

local job = load(id)
if job and job.call == call then return job.answer end
if not held(job, token) then return 'lost' end
redis.call('HSET', job.key, 'checkpoint_attempt', job.attempt, 'checkpoint_name', name, 'checkpoint_step', step)
append(job, 'checkpoint', '"job"', '{"step":' .. step .. '}')
return answer(job, 'done')

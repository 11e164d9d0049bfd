-- Ends the job with its attempt's outcome. ARGV: token, state, execution_mode or "", what the outcome brings (result or
-- error as JSON, or ""), the names of the outputs as JSON. Answers "lost" or "done".
local token, state, mode, brings, names = unpack(ARGV, 5, 9)

local job = load(id)
if job and job.call == call then return job.answer end
if not held(job, token) then return 'lost' end
for _, of in ipairs({ job, job.whole }) do
  if mode ~= '' then
    of.execution_mode = mode
    redis.call('HSET', of.key, 'execution_mode', mode)
  end
end
if state == 'succeeded' then
  succeed(job, brings, names)
elseif state == 'failed' then
  fail(job, brings)
else
  cancel(job)
end
return answer(job, 'done')

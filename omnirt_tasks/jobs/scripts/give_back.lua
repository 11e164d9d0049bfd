-- Ends an attempt without an outcome. ARGV: token, reason as JSON. Answers "lost" or "done".
local job = load()
if job and job.call == call then return job.answer end
if not held(job, ARGV[5]) then return 'lost' end
release(job, ARGV[6])
return answer('done')

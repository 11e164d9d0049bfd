-- Takes a job off its owner's dead letters. Answers false for an unknown job.
local job = load()
if not job then return false end
redis.call('HDEL', job_key, 'dead_letter')
redis.call('ZREM', dead_key(job.owner), id)
return 'done'

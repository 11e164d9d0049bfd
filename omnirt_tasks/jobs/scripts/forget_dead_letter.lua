-- Takes a job off its owner's dead letters. Answers false for an unknown job.
local job = load(id)
if not job or job.whole then return false end
redis.call('HDEL', job.key, 'dead_letter')
redis.call('ZREM', dead_key(job.owner), id)
return 'done'

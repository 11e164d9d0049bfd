-- The place of a waiting job in its queue, from 1. Answers false for an unknown job, 0 for one that does not wait.
local job = load()
if not job then return false end
local rank = redis.call('ZRANK', waiting_key(job.queue), id)
return rank and rank + 1 or 0

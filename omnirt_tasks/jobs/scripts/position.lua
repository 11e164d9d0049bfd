-- The place of a waiting job in its queue, from 1. Answers false for an unknown job, 0 for one that does not wait.
-- A split job waits where the first of its parts does.
local job = load(id)
if not job or job.whole then return false end
local first
for number = 0, (job.parts or 1) - 1 do
  local rank = redis.call('ZRANK', waiting_key(job.queue), job.parts and id .. '.' .. number or id)
  if rank and (not first or rank < first) then first = rank end
end
return first and first + 1 or 0

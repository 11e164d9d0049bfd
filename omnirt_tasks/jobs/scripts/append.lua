-- Appends events of the current attempt. ARGV: token, then for each event: name, stage as JSON, data as JSON, phase,
-- step, total; the last three are "" where the event does not move them. Answers "lost" or "done".
-- Its call is noted apart from those of other scripts, which come between two tries of a flusher.
local job = load()
if not held(job, ARGV[5]) then return 'lost' end
if job.appended == call then return 'done' end
for i = 6, #ARGV, 6 do
  append(ARGV[i], ARGV[i + 1], ARGV[i + 2])
  if ARGV[i + 3] ~= '' then redis.call('HSET', job_key, 'phase', ARGV[i + 3]) end
  if ARGV[i + 4] ~= '' then redis.call('HSET', job_key, 'step', ARGV[i + 4], 'total', ARGV[i + 5]) end
end
redis.call('HSET', job_key, 'appended', call)
return 'done'

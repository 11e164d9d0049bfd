-- Appends events of the current attempt. ARGV: token, then for each event: name, stage as JSON, data as JSON, phase,
-- step, total; the last three are "" where the event does not move them, and told are they in no data.
-- Answers "lost" or "done". Its call is noted apart from those of other scripts, which come between two tries of a
-- flusher. The progress of a part is that of the whole job, to whoever watches.
local job = load(id)
if not held(job, ARGV[5]) then return 'lost' end
if job.appended == call then return 'done' end
for i = 6, #ARGV, 6 do
  local event, stage, data, phase, step, total = unpack(ARGV, i, i + 5)
  if step ~= '' then
    redis.call('HSET', job.key, 'step', step, 'total', total)
    if job.whole and not over(job.whole) then
      local sum = follow(job.whole)
      step, total = string.format('%d', sum.step), string.format('%d', sum.steps)
    end
    data = with_members('"step":' .. step .. ',"total":' .. total, data)
  end
  append(job, event, stage, data)
  if phase ~= '' then
    redis.call('HSET', job.key, 'phase', phase)
    if job.whole and not over(job.whole) then redis.call('HSET', job.whole.key, 'phase', phase) end
  end
end
redis.call('HSET', job.key, 'appended', call)
return 'done'

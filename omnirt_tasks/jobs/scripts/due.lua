-- Promotes what has waited for long, and looks for what is to be sent. ARGV: queue, unclaimed_after_ms, promote_after_ms,
-- limit. Answers jobs and their priorities in turn: those that wait unclaimed, have waited for their retry, or were
-- promoted. They count as sent now, so that they are named once per period.
local queue, unclaimed_after_ms, promote_after_ms = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local limit = tonumber(ARGV[8])

local function up_to(key, ms) return redis.call('ZRANGEBYSCORE', key, '-inf', ms, 'LIMIT', 0, limit) end

local to_send, named = {}, {}
local function send(job_id)
  if not named[job_id] then table.insert(to_send, job_id) end
  named[job_id] = true
end

local function promote(job)
  job.priority, job.promoted_serial = NEXT_HIGHER[job.priority], redis.call('INCR', serial_key)
  redis.call('HSET', job.key, 'priority', job.priority, 'promoted_serial', job.promoted_serial, 'promoted_at_ms', now)
  redis.call('ZADD', waiting_key(queue), place_in_line(job), job.id)
  if job.whole then redis.call('HSET', job.whole.key, 'priority', job.priority) end
  if not job.not_before_ms or passed(job.not_before_ms) then send(job.id) end
end

-- A job whose record was removed from outside is to hold up no other.
local function forget(job_id)
  for _, key in ipairs({ waiting_key, sent_key, delayed_key, deadlines_key }) do
    redis.call('ZREM', key(queue), job_id)
  end
end

-- Serials grow as time does, so within a priority those in front have waited longest.
for _, priority in ipairs({ 'normal', 'low' }) do
  local from = RANKS[priority] * RANK_SPAN
  local first, after = string.format('%.0f', from), string.format('(%.0f', from + RANK_SPAN)
  for _, job_id in ipairs(redis.call('ZRANGEBYSCORE', waiting_key(queue), first, after, 'LIMIT', 0, limit)) do
    local job = load(job_id)
    if not job then
      forget(job_id)
    elseif passed((job.promoted_at_ms or job.enqueued_at_ms) + promote_after_ms) then
      promote(job)
    else
      break
    end
  end
end

for _, job_id in ipairs(up_to(sent_key(queue), now - unclaimed_after_ms)) do send(job_id) end
for _, job_id in ipairs(up_to(delayed_key(queue), now)) do
  redis.call('ZREM', delayed_key(queue), job_id)
  send(job_id)
end

local answers = {}
for _, job_id in ipairs(to_send) do
  redis.call('ZADD', sent_key(queue), now, job_id)
  table.insert(answers, job_id)
  table.insert(answers, redis.call('HGET', job_key(job_id), 'priority') or 'normal')
end
forget_if_empty(queue)
return answers

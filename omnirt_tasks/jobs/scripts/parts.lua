-- Follows the prelude: how a job ends, and how the record of one that was split follows its parts.

local function part_key(whole, number) return job_key(whole.id .. '.' .. number) end

-- The parts of a split job that are not over.
local function open_parts(whole)
  local parts = {}
  for number = 0, whole.parts - 1 do
    local part = load(whole.id .. '.' .. number, whole)
    if part and not over(part) then table.insert(parts, part) end
  end
  return parts
end

-- How the parts of a job stand, and what they have done together: steps of a part that has not told how many it has
-- count as many as another's, and one that succeeded has made them all.
local function tally(whole)
  local sum = { queued = 0, running = 0, succeeded = 0, step = 0, attempt = 0, steps = 0, outputs = {} }
  local untold, untold_done, workers = 0, 0, {}
  for number = 0, whole.parts - 1 do
    local state, step, total, attempt, worker_id, outputs = unpack(
      redis.call('HMGET', part_key(whole, number), 'state', 'step', 'total', 'attempt', 'worker_id', 'outputs'))
    if sum[state] then sum[state] = sum[state] + 1 end
    sum.attempt = math.max(sum.attempt, tonumber(attempt))
    if worker_id and workers[worker_id] == nil then workers[worker_id], workers[#workers + 1] = true, worker_id end
    if outputs and outputs ~= '[]' then table.insert(sum.outputs, string.sub(outputs, 2, -2)) end
    if total then
      sum.steps, sum.most = sum.steps + total, math.max(sum.most or 0, tonumber(total))
      sum.step = sum.step + (state == 'succeeded' and total or step)
    else
      untold, untold_done = untold + 1, untold_done + (state == 'succeeded' and 1 or 0)
    end
  end
  sum.worker_id = #workers == 1 and workers[1] or nil
  if sum.most then
    sum.steps, sum.step = sum.steps + untold * sum.most, sum.step + untold_done * sum.most
  end
  return sum
end

-- Lets the record of a split job say what its parts do; once it is over, only how they stand.
local function follow(whole)
  local sum = tally(whole)
  redis.call('HSET', whole.key, 'parts_queued', sum.queued, 'parts_running', sum.running,
    'parts_succeeded', sum.succeeded)
  if over(whole) then return sum end
  redis.call('HSET', whole.key, 'attempt', sum.attempt)
  if sum.worker_id then
    redis.call('HSET', whole.key, 'worker_id', sum.worker_id)
  else
    redis.call('HDEL', whole.key, 'worker_id') -- several, or none
  end
  if sum.most then
    redis.call('HSET', whole.key, 'step', sum.step, 'total', sum.steps)
  else
    redis.call('HDEL', whole.key, 'step', 'total')
  end
  return sum
end

-- The keys outlive `expires_at_ms` by a day, so that the sweeper finds them; should it never come, Redis drops them.
-- A part lasts as long as the job that it is part of.
local function keep(job)
  local expires_at_ms = now + job_ttl_ms
  redis.call('HSET', job.key, 'expires_at_ms', expires_at_ms)
  redis.call('ZADD', finished_key, expires_at_ms, job.id)
  redis.call('PEXPIREAT', job.key, expires_at_ms + DAY_MS)
  redis.call('PEXPIREAT', log_key(job.id), expires_at_ms + DAY_MS)
  for number = 0, (job.parts or 0) - 1 do redis.call('PEXPIREAT', part_key(job, number), expires_at_ms + DAY_MS) end
end

local EVENTS = { succeeded = 'job_finished', failed = 'job_failed', cancelled = 'job_cancelled' }

-- Ends a job that is not split, a part alone, or a whole job whose parts were seen to. `told` is the event's data.
local function finish_alone(job, state, told)
  enter(job, state)
  redis.call('HSET', job.key, 'finished_at_ms', now)
  if job.whole then return end
  append(job, EVENTS[state], '"job"', told)
  keep(job)
end

local function fail_alone(job, error_json)
  finish_alone(job, 'failed', '{"error":' .. error_json .. '}')
  redis.call('HSET', job.key, 'error', error_json)
end

-- No part of the job begins any more: those that wait end here, and the holders of those that run are asked to stop.
local function stop_parts(whole)
  for _, part in ipairs(open_parts(whole)) do
    redis.call('HSET', part.key, 'cancel_requested', 1)
    if part.state == 'running' then
      redis.call('PUBLISH', cancel_channel, part.id)
    else
      finish_alone(part, 'cancelled')
    end
  end
  return follow(whole)
end

-- Cancels a job that is split. Whether it is over then: not as long as a part runs.
local function cancel_whole(whole)
  whole.cancel_requested = '1'
  redis.call('HSET', whole.key, 'cancel_requested', 1)
  if stop_parts(whole).running > 0 then return false end
  finish_alone(whole, 'cancelled', '{}')
  return true
end

-- After a part, with which the whole job may be over. Failures are told as those of the part.
local function go_on_after(part, error_json)
  local whole = part.whole
  if over(whole) then
    follow(whole)
  elseif part.state == 'failed' then
    local told = cjson.decode(error_json)
    told.message = part.told_as .. told.message
    fail_alone(whole, cjson.encode(told))
    stop_parts(whole)
  elseif part.state == 'cancelled' then
    cancel_whole(whole)
  else
    local sum = follow(whole)
    if sum.succeeded == tonumber(whole.parts) then
      finish_alone(whole, 'succeeded', '{"outputs":[' .. table.concat(sum.outputs, ',') .. ']}')
    elseif whole.cancel_requested and sum.running == 0 then
      finish_alone(whole, 'cancelled', '{}')
    else
      append(part, 'part_finished', '"job"', '{"outputs":' .. redis.call('HGET', part.key, 'outputs') .. '}')
    end
  end
end

-- Ends a job, split or not, or a part and perhaps the whole job with it. Whether it is over then.
local function cancel(job)
  if job.parts then return cancel_whole(job) end
  finish_alone(job, 'cancelled', '{}')
  if job.whole then go_on_after(job) end
  return true
end

local function fail(job, error_json)
  fail_alone(job, error_json)
  if job.whole then go_on_after(job, error_json) end
end

-- `names` are those of its outputs, as JSON.
local function succeed(job, result_json, names)
  finish_alone(job, 'succeeded', '{"outputs":' .. names .. '}')
  redis.call('HSET', job.key, 'result', result_json)
  if job.started_at_ms then
    redis.call('LPUSH', times_key(job.queue), string.format('%d %s', now - job.started_at_ms, job.kind))
    redis.call('LTRIM', times_key(job.queue), 0, SERVICE_TIMES_MAX - 1)
    redis.call('PEXPIRE', times_key(job.queue), SERVICE_TIMES_KEPT_MS)
  end
  if job.whole then
    redis.call('HSET', job.key, 'outputs', names)
    go_on_after(job)
  end
end

-- An attempt is over and the job is not: back to its old place in the queue, unless nobody wants it any more, its time
-- is over, or it is to blame. `how`: died, alone, retry as booleans, delay_ms and avoid_ms (see Requeue).
local function release(job, reason, how)
  local to_blame = how.died and job.alone
  local deaths = tonumber(job.deaths or 0) + (to_blame and 1 or 0)
  local worker_id, delay_ms, avoid_ms = job.worker_id, how.delay_ms or 0, how.avoid_ms or 0
  if job.cancel_requested then
    cancel(job)
  elseif passed(job.deadline_at_ms) then
    fail(job, TIMED_OUT)
  elseif to_blame and deaths >= DEATHS_MAX then
    fail(job, WORKER_LOST)
    local letter = job.whole or job
    redis.call('HSET', letter.key, 'dead_letter', 1)
    redis.call('ZADD', dead_key(letter.owner), letter.serial, letter.id)
  else
    enter(job, 'queued')
    redis.call('HDEL', job.key, 'worker_id', 'started_at_ms', 'step', 'total')
    wait_in_queue(job, delay_ms)
    if avoid_ms > 0 then
      redis.call('HSET', job.key, 'avoided_worker', worker_id, 'avoided_until_ms', now + delay_ms + avoid_ms)
    end
    append(job, job.whole and 'part_requeued' or 'job_requeued', '"job"',
      '{"attempt":' .. job.attempt .. ',"reason":' .. reason .. '}')
    if job.whole then follow(job.whole) end
  end
  if to_blame then redis.call('HSET', job.key, 'deaths', deaths) end
  if how.retry then redis.call('HINCRBY', job.key, 'retries', 1) end
  if how.died or how.alone then
    job.runs_alone = '1'
    redis.call('HSET', job.key, 'runs_alone', 1)
  end
end

-- What ran a job under a lease that has expired is dead, as far as anybody can tell.
local function expire(job) release(job, '"lease_expired"', { died = true }) end

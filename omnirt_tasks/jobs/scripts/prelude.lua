-- Prepended to every script: the keys, the clock, and the moves of a job's life.
--   ARGV: prefix, job id ("" where the script is about no single job), job_ttl_ms, call, then the script's own
--   Constants from effects.py stand before it: LOG_LENGTH, AWAITED_MS, DEATHS_MAX, and the errors WORKER_LOST and TIMED_OUT as JSON
-- Keys follow from the prefix and the record (its queue, its owner), so the scripts need one Redis, not a cluster.

local prefix, id, job_ttl_ms, call = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]

local DAY_MS = 24 * 3600 * 1000

local MOVES = {
  queued = { running = true, cancelled = true, failed = true },
  running = { queued = true, succeeded = true, failed = true, cancelled = true },
  succeeded = {},
  failed = {},
  cancelled = {},
}

local job_key, log_key = prefix .. ':job:' .. id, prefix .. ':log:' .. id
local queues_key, finished_key, states_key = prefix .. ':queues', prefix .. ':finished', prefix .. ':states'

local function waiting_key(queue) return prefix .. ':waiting:' .. queue end -- id → serial, the order of arrival
local function sent_key(queue) return prefix .. ':sent:' .. queue end -- waiting id → when its message was last sent
local function delayed_key(queue) return prefix .. ':delayed:' .. queue end -- waiting id → when it is to be sent
local function deadlines_key(queue) return prefix .. ':deadlines:' .. queue end -- waiting id → its deadline
local function running_key(queue) return prefix .. ':running:' .. queue end -- id → when its lease expires
local function owner_key(owner) return prefix .. ':owner:' .. owner end -- id → serial
local function dead_key(owner) return prefix .. ':dead:' .. owner end -- id → serial
local function idempotency_key(owner, digest) return prefix .. ':idempotency:' .. owner .. ':' .. digest end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local FIELDS = {
  'state', 'queue', 'owner', 'serial', 'task', 'model', 'execution_mode', 'attempt', 'token', 'lease_expires_at_ms',
  'cancel_requested', 'deadline_at_ms', 'worker_id', 'alone', 'runs_alone', 'deaths', 'not_before_ms',
  'avoided_worker', 'avoided_until_ms', 'awaited_by', 'awaited_until_ms', 'idempotency', 'call', 'answer', 'appended',
}

-- What the scripts need of the record, or nil for an unknown job.
local function load()
  local values = redis.call('HMGET', job_key, unpack(FIELDS))
  if not values[1] then return nil end
  local job = {}
  for i, field in ipairs(FIELDS) do job[field] = values[i] or nil end
  return job
end

-- A client that lost the answer to a call sends the call again: it gets the answer and changes nothing twice.
local function answer(value)
  redis.call('HSET', job_key, 'call', call, 'answer', value)
  return value
end

local function held(job, token) return job and job.state == 'running' and job.token == token end

local function over(job) return next(MOVES[job.state]) == nil end

-- Whether a time of the record, if it has it, has come.
local function passed(ms) return ms and tonumber(ms) <= now end

-- `stage` and `data` are JSON already. The log, and whoever watches, get the same text.
local function append(event, stage, data)
  local seq = redis.call('HINCRBY', job_key, 'seq', 1)
  local text = string.format('{"seq":%d,"event":"%s","stage":', seq, event) .. stage
    .. string.format(',"timestamp_ms":%d,"data":', now) .. data .. '}'
  redis.call('XADD', log_key, 'MAXLEN', LOG_LENGTH, string.format('%d-0', seq), 'event', text)
  redis.call('PUBLISH', prefix .. ':events:' .. id, text)
end

local function count(job, state)
  local mode = job.execution_mode or 'unknown'
  redis.call('HINCRBY', states_key, job.task .. '|' .. job.model .. '|' .. mode .. '|' .. state, 1)
end

-- Call it before any other write: a move that is not allowed stops the script here.
local function enter(job, state)
  if not MOVES[job.state][state] then
    error({ err = 'ILLEGALMOVE ' .. job.state .. ' to ' .. state })
  end
  redis.call('HSET', job_key, 'state', state)
  redis.call('HDEL', job_key, 'phase', 'token', 'lease_expires_at_ms', 'alone', 'not_before_ms', 'avoided_worker',
    'avoided_until_ms', 'awaited_by', 'awaited_until_ms')
  redis.call('ZREM', waiting_key(job.queue), id)
  redis.call('ZREM', sent_key(job.queue), id)
  redis.call('ZREM', running_key(job.queue), id)
  if job.not_before_ms then redis.call('ZREM', delayed_key(job.queue), id) end
  if job.deadline_at_ms then redis.call('ZREM', deadlines_key(job.queue), id) end
  count(job, state)
  job.state, job.not_before_ms, job.avoided_worker = state, nil, nil
end

-- It is claimed, and its message sent, not before `delay_ms` have passed.
local function wait_in_queue(job, delay_ms)
  redis.call('ZADD', waiting_key(job.queue), job.serial, id)
  if delay_ms > 0 then
    redis.call('ZADD', delayed_key(job.queue), now + delay_ms, id)
    redis.call('HSET', job_key, 'not_before_ms', now + delay_ms)
  else
    redis.call('ZADD', sent_key(job.queue), now, id)
  end
  if job.deadline_at_ms then redis.call('ZADD', deadlines_key(job.queue), job.deadline_at_ms, id) end
  redis.call('SADD', queues_key, job.queue)
end

-- Queues are remembered when a job comes, and forgotten by whoever looks at them.
local function forget_if_empty(queue)
  if redis.call('EXISTS', waiting_key(queue), running_key(queue)) == 0 then redis.call('SREM', queues_key, queue) end
end

-- The keys outlive `expires_at_ms` by a day, so that the sweeper finds them; should it never come, Redis drops them.
local function finish(job, state, event, data)
  enter(job, state)
  local expires_at_ms = now + job_ttl_ms
  redis.call('HSET', job_key, 'finished_at_ms', now, 'expires_at_ms', expires_at_ms)
  redis.call('ZADD', finished_key, expires_at_ms, id)
  append(event, '"job"', data)
  redis.call('PEXPIREAT', job_key, expires_at_ms + DAY_MS)
  redis.call('PEXPIREAT', log_key, expires_at_ms + DAY_MS)
end

local function fail(job, error_json)
  finish(job, 'failed', 'job_failed', '{"error":' .. error_json .. '}')
  redis.call('HSET', job_key, 'error', error_json)
end

-- An attempt is over and the job is not: back to its old place in the queue, unless nobody wants it any more, its time
-- is over, or it is to blame. `how`: died, alone, retry as booleans, delay_ms and avoid_ms (see Requeue).
local function release(job, reason, how)
  local to_blame = how.died and job.alone
  local deaths = tonumber(job.deaths or 0) + (to_blame and 1 or 0)
  local worker_id, delay_ms, avoid_ms = job.worker_id, how.delay_ms or 0, how.avoid_ms or 0
  if job.cancel_requested then
    finish(job, 'cancelled', 'job_cancelled', '{}')
  elseif passed(job.deadline_at_ms) then
    fail(job, TIMED_OUT)
  elseif to_blame and deaths >= DEATHS_MAX then
    fail(job, WORKER_LOST)
    redis.call('HSET', job_key, 'dead_letter', 1)
    redis.call('ZADD', dead_key(job.owner), job.serial, id)
  else
    enter(job, 'queued')
    redis.call('HDEL', job_key, 'worker_id', 'started_at_ms', 'step', 'total')
    wait_in_queue(job, delay_ms)
    if avoid_ms > 0 then
      redis.call('HSET', job_key, 'avoided_worker', worker_id, 'avoided_until_ms', now + delay_ms + avoid_ms)
    end
    append('job_requeued', '"job"', '{"attempt":' .. job.attempt .. ',"reason":' .. reason .. '}')
  end
  if to_blame then redis.call('HSET', job_key, 'deaths', deaths) end
  if how.retry then redis.call('HINCRBY', job_key, 'retries', 1) end
  if how.died or how.alone then
    job.runs_alone = '1'
    redis.call('HSET', job_key, 'runs_alone', 1)
  end
end

-- What ran a job under a lease that has expired is dead, as far as anybody can tell.
local function expire(job) release(job, '"lease_expired"', { died = true }) end

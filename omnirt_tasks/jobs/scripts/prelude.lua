-- Prepended to every script: the keys, the clock, and the moves of a job's life. What is about a split job as a whole
-- follows in parts.lua.
--   ARGV: prefix, job id ("" where the script is about no single job), job_ttl_ms, call, then the script's own
--   Constants of the other store's rules stand before it, in capitals: see scripting.py
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

local queues_key, finished_key, states_key = prefix .. ':queues', prefix .. ':finished', prefix .. ':states'
local serial_key, cancel_channel = prefix .. ':serial', prefix .. ':cancel'

local function job_key(job_id) return prefix .. ':job:' .. job_id end
local function log_key(job_id) return prefix .. ':log:' .. job_id end
local function waiting_key(queue) return prefix .. ':waiting:' .. queue end -- id → place in line, see `place_in_line`
local function sent_key(queue) return prefix .. ':sent:' .. queue end -- waiting id → when its message was last sent
local function delayed_key(queue) return prefix .. ':delayed:' .. queue end -- waiting id → when it is to be sent
local function deadlines_key(queue) return prefix .. ':deadlines:' .. queue end -- waiting id → its deadline
local function running_key(queue) return prefix .. ':running:' .. queue end -- id → when its lease expires
local function times_key(queue) return prefix .. ':times:' .. queue end -- "milliseconds kind", the newest first
local function owner_key(owner) return prefix .. ':owner:' .. owner end -- id → serial
local function dead_key(owner) return prefix .. ':dead:' .. owner end -- id → serial
local function idempotency_key(owner, digest) return prefix .. ':idempotency:' .. owner .. ':' .. digest end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local FIELDS = {
  'state', 'queue', 'owner', 'serial', 'task', 'model', 'kind', 'execution_mode', 'attempt', 'token',
  'lease_expires_at_ms', 'cancel_requested', 'enqueued_at_ms', 'started_at_ms', 'deadline_at_ms', 'worker_id', 'alone',
  'runs_alone', 'deaths', 'not_before_ms', 'avoided_worker', 'avoided_until_ms', 'awaited_by', 'awaited_until_ms',
  'priority', 'promoted_at_ms', 'promoted_serial', 'idempotency', 'call', 'answer', 'appended',
  'parts', 'part_of', 'part', 'told_as',
}

-- What the scripts need of a record, or nil for an unknown job. A part brings the job that it is part of, its `whole`,
-- which a caller that has it gives, so that whatever becomes of it is seen by all.
local function load(job_id, whole)
  local key = job_key(job_id)
  local values = redis.call('HMGET', key, unpack(FIELDS))
  if not values[1] then return nil end
  local job = { id = job_id, key = key }
  for i, field in ipairs(FIELDS) do job[field] = values[i] or nil end
  job.priority = job.priority or 'normal' -- there were jobs before there were priorities
  if job.part_of then
    job.whole = whole or load(job.part_of)
    if not job.whole then return nil end
  end
  return job
end

-- A client that lost the answer to a call sends the call again: it gets the answer and changes nothing twice.
local function answer(job, value)
  redis.call('HSET', job.key, 'call', call, 'answer', value)
  return value
end

local function held(job, token) return job and job.state == 'running' and job.token == token end

local function over(job) return next(MOVES[job.state]) == nil end

-- Whether a time of the record, if it has it, has come.
local function passed(ms) return ms and tonumber(ms) <= now end

-- A JSON object with further members before its own.
local function with_members(members, object)
  return '{' .. members .. (object == '{}' and '}' or ',' .. string.sub(object, 2))
end

-- `stage` and `data` are JSON already. The log, and whoever watches, get the same text. What is told of a part is told
-- in the log of the whole job, as long as that is not over.
local function append(job, event, stage, data)
  local teller = job.whole or job
  if job.whole then
    if over(job.whole) then return end
    data = with_members('"part":' .. job.part, data)
  end
  local seq = redis.call('HINCRBY', teller.key, 'seq', 1)
  local text = string.format('{"seq":%d,"event":"%s","stage":', seq, event) .. stage
    .. string.format(',"timestamp_ms":%d,"data":', now) .. data .. '}'
  redis.call('XADD', log_key(teller.id), 'MAXLEN', LOG_LENGTH, string.format('%d-0', seq), 'event', text)
  redis.call('PUBLISH', prefix .. ':events:' .. teller.id, text)
  if job.whole then redis.call('HSET', job.key, 'seq', seq) end
end

-- How often each state was entered, by jobs: their parts are none.
local function count(job, state)
  if job.whole then return end
  local mode = job.execution_mode or 'unknown'
  redis.call('HINCRBY', states_key, job.task .. '|' .. job.model .. '|' .. mode .. '|' .. state, 1)
end

-- Call it before any other write: a move that is not allowed stops the script here.
local function enter(job, state)
  if not MOVES[job.state][state] then
    error({ err = 'ILLEGALMOVE ' .. job.state .. ' to ' .. state })
  end
  redis.call('HSET', job.key, 'state', state)
  redis.call('HDEL', job.key, 'phase', 'token', 'lease_expires_at_ms', 'alone', 'not_before_ms', 'avoided_worker',
    'avoided_until_ms', 'awaited_by', 'awaited_until_ms')
  redis.call('ZREM', waiting_key(job.queue), job.id)
  redis.call('ZREM', sent_key(job.queue), job.id)
  redis.call('ZREM', running_key(job.queue), job.id)
  if job.not_before_ms then redis.call('ZREM', delayed_key(job.queue), job.id) end
  if job.deadline_at_ms then redis.call('ZREM', deadlines_key(job.queue), job.id) end
  count(job, state)
  job.state, job.not_before_ms, job.avoided_worker = state, nil, nil
end

-- Those of a higher priority stand before all others; within one, by serial: that of the job, or of its promotion.
local function place_in_line(job)
  return string.format('%.0f', RANKS[job.priority] * RANK_SPAN + (job.promoted_serial or job.serial))
end

-- It is claimed, and its message sent, not before `delay_ms` have passed.
local function wait_in_queue(job, delay_ms)
  redis.call('ZADD', waiting_key(job.queue), place_in_line(job), job.id)
  if delay_ms > 0 then
    redis.call('ZADD', delayed_key(job.queue), now + delay_ms, job.id)
    redis.call('HSET', job.key, 'not_before_ms', now + delay_ms)
  else
    redis.call('ZADD', sent_key(job.queue), now, job.id)
  end
  if job.deadline_at_ms then redis.call('ZADD', deadlines_key(job.queue), job.deadline_at_ms, job.id) end
  redis.call('SADD', queues_key, job.queue)
end

-- Queues are remembered when a job comes, and forgotten by whoever looks at them.
local function forget_if_empty(queue)
  if redis.call('EXISTS', waiting_key(queue), running_key(queue)) == 0 then redis.call('SREM', queues_key, queue) end
end

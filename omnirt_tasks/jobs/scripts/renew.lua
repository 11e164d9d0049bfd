-- Prolongs a lease. ARGV: token, lease_ttl_ms. Answers "lost", "held" or "cancel".
local job = load(id)
if not held(job, ARGV[5]) then return 'lost' end
local lease_expires_at_ms = now + tonumber(ARGV[6])
redis.call('HSET', job.key, 'lease_expires_at_ms', lease_expires_at_ms)
redis.call('ZADD', running_key(job.queue), lease_expires_at_ms, id)
return job.cancel_requested and 'cancel' or 'held'

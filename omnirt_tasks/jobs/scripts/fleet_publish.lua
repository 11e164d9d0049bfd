-- Keeps a worker's capability record until now + ttl_ms. ARGV: worker_id, record as JSON, ttl_ms.
redis.call('ZADD', prefix .. ':fleet', now + tonumber(ARGV[7]), ARGV[5])
redis.call('HSET', prefix .. ':workers', ARGV[5], ARGV[6])

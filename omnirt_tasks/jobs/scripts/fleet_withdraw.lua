-- Forgets a worker. ARGV: worker_id.
redis.call('ZREM', prefix .. ':fleet', ARGV[5])
redis.call('HDEL', prefix .. ':workers', ARGV[5])

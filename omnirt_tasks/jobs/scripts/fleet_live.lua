-- Drops the workers that have gone silent, and answers the records of the others.
for _, worker_id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. ':fleet', '-inf', now)) do
  redis.call('ZREM', prefix .. ':fleet', worker_id)
  redis.call('HDEL', prefix .. ':workers', worker_id)
end
return redis.call('HVALS', prefix .. ':workers')

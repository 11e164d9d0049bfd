-- Ends an attempt without an outcome. ARGV: token, reason as JSON, died, alone, retry (0 | 1), delay_ms, avoid_ms.
-- Answers "lost" or "done".
local job = load(id)
if job and job.call == call then return job.answer end
if not held(job, ARGV[5]) then return 'lost' end
release(job, ARGV[6], {
  died = ARGV[7] == '1',
  alone = ARGV[8] == '1',
  retry = ARGV[9] == '1',
  delay_ms = tonumber(ARGV[10]),
  avoid_ms = tonumber(ARGV[11]),
})
return answer(job, 'done')

-- For wrk: POST the file SPEED_BODY with the headers in the file SPEED_HEADERS ("Name: value" lines); print the outcome.
local file = assert(io.open(os.getenv("SPEED_BODY"), "rb"))
wrk.method, wrk.body = "POST", file:read("*a")
file:close()
for line in io.lines(os.getenv("SPEED_HEADERS")) do
  local name, value = line:match("^([^:]+): (.*)$")
  wrk.headers[name] = value
end

function done(summary, latency, requests)
  local e = summary.errors
  print(string.format(
    'OUTCOME {"requests": %d, "seconds": %.6f, "bad_status": %d, "socket_errors": %d, "p50_us": %d, "p99_us": %d}',
    summary.requests, summary.duration / 1e6, e.status, e.connect + e.read + e.write + e.timeout,
    latency:percentile(50), latency:percentile(99)))
end

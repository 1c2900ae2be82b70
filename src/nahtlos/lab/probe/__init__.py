"""The prober: a customer's eyes. It runs outside the system under test and knows nothing of it but the
addresses of servers and the operator API's socket.

    python -m nahtlos.lab.probe --plan FILE --out DIR

It owns DIR (`nahtlos.runtime.evidence.records` says what is in it). It never judges, and it never changes
the system: `subscribe` and GET are all it says beside the datagrams and lines it numbers.

One thread, one tick of 1 / pps seconds. In each tick every server is sent one datagram; then whatever
TCP has ready is taken; echoes are fetched only every few ticks, because the kernel has stamped their
arrival already. That keeps six servers at 250 datagrams a second below an eighth of a core.

    server:  WAITING --echo, HTTP, TCP answered--> MEASURED --SIGTERM, plan drops it--> DRAINING --> ENDED

The plan (JSON) is read again whenever the file changes:

    {"servers": [{"name": "web-1", "ip": "10.77.0.10", "start": 1790000000.0}], "udp_pps": 250,
     "tcp_interval": 0.05, "http_interval": 0.1, "api_socket": "/run/…/operator.sock"}

`start` is the wall-clock second at which the server was asked for; absent: when the probe read of it.
"""

"""Volumes as RBD images of a RADOS pool, behind the same port as the embedded ones.

`worker` is a process of its own, run by the system's Python because Ceph's bindings are packages of the
system; `process` speaks to it with deadlines; `images` says what an image's facts mean (pure); `driver` is
the port; `gateway` serves images over NBD where others than servers must reach them: relocation. Servers
reach their images directly.
"""

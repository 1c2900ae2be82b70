"""Volumes. `embedded` serves raw files of this host over NBD from one qemu-storage-daemon: `daemon` says
how it is run (pure), `volumes` keeps the files. Ceph would stand beside it behind the same port."""

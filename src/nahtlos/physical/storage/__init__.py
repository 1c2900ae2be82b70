"""Volumes. `embedded` keeps them in files of this host and serves them over NBD from one qemu-storage-daemon:

    record       what is on disk, and the file that says so          graph, definition   what a daemon is told
    serving      keeps the daemon at what the records say            daemon, release     the process itself
    lifecycle    made, served by an epoch, enlarged, deleted         snapshots, merging  layers come and go
    decisions    what is to be done, pure                            layers, sparse      files

Images, encryption, backups, exports, replication and relocation are modules of their own beside these. `ceph`
serves images of a RADOS pool behind the same port; `backends` tells which volume is whose."""

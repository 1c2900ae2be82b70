"""QEMU through QMP, without libvirt.

`bundle` finds releases and how to run their programs; `commandline` says what a VMM looks like (pure);
`qmp` speaks to one; `vmm` is one VMM of this host; `migration` is the order of commands of a move;
`accelerator` chooses by booting; `driver` is `physical.ports.Hypervisor`.
"""

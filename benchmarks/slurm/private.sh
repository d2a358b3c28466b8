#!/bin/sh
# `private.sh COMMAND...` runs COMMAND where there is a SLURM of one node of four cores, which ends with it, whatever ends it.
#
# Network, processes, mounts and the name of the host are its own, so nothing of this machine's is touched or reached, and
# nothing is left when the first of its processes is gone. Needs root, and on Debian, so that no service is started:
#   RUNLEVEL=1 apt-get install --no-install-recommends iproute2 munge slurm-client slurmctld slurmd
set -eu
if [ "${PRIVATE_SLURM:-}" = "" ]; then
  export PRIVATE_SLURM=1
  exec unshare --net --mount --pid --fork --kill-child --mount-proc --uts -- "$0" "$@"
fi

hostname node
ip link set lo up
# With the loopback alone no name is found, and without a route Dask does not know which address is its own.
ip link add veth0 type veth peer name veth1
ip address add 10.0.0.1/24 dev veth0
ip link set veth0 up
ip link set veth1 up
ip route add default via 10.0.0.2

# munged has its socket there.
mount -t tmpfs -o mode=755 none /run
mkdir /run/munge /run/state /run/spool
printf '10.0.0.1 node\n' > /run/hosts
mount --bind /run/hosts /etc/hosts

(umask 077 && head -c 128 /dev/urandom > /run/key)
munged --force --key-file=/run/key --pid-file=/run/munged.pid \
  --log-file=/run/munged.log --seed-file=/run/seed

cat > /run/slurm.conf << EOF
ClusterName=private
SlurmctldHost=node
SlurmUser=root
SlurmdUser=root
StateSaveLocation=/run/state
SlurmdSpoolDir=/run/spool
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/run/slurmctld.log
SlurmdLogFile=/run/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
SlurmdParameters=config_overrides
KillWait=2
NodeName=node NodeAddr=10.0.0.1 CPUs=4 RealMemory=16000
PartitionName=main Nodes=node Default=YES MaxTime=INFINITE State=UP
EOF
export SLURM_CONF=/run/slurm.conf
slurmctld
slurmd
# The node is there when it says so.
tries=0
until sinfo --noheader --states=idle 2> /dev/null | grep -q node; do
  tries=$((tries + 1))
  if [ $tries = 100 ]; then
    tail -n 20 /run/*.log >&2
    exit 1
  fi
  sleep 0.1
done

"$@"

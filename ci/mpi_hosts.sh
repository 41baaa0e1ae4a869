#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces with a cable (veth) between, two ranks on each, and a ring across. Every
# message between the two goes through TCP, and so does the job's board. Where namespaces can't be made, says so and ends well.
#
# usage: ci/mpi_hosts.sh PROGRAM FLAVOUR (openmpi or mpich: what the program was built with)
set -euo pipefail
cd "$(dirname "$0")/.."

readonly program=$(realpath "$1") flavour=$2
readonly input=conformance/data/minilm-layer0.safetensors
readonly a=longspan-a$$ b=longspan-b$$
work=$(mktemp -d)

end() {
    ip netns del $a 2>/dev/null || true
    ip netns del $b 2>/dev/null || true
    rm -rf "$work"
}
trap end EXIT

if ! command -v ip >/dev/null || ! ip netns add $a 2>"$work/why" || ! ip netns add $b 2>>"$work/why"; then
    echo "two hosts: not run, this machine gives no network namespaces: $(cat "$work/why" 2>/dev/null || true)"
    exit 0
fi
ip link add cable netns $a type veth peer name cable netns $b
ip -n $a addr add 10.77.0.1/24 dev cable
ip -n $b addr add 10.77.0.2/24 dev cable
for space in $a $b; do
    ip -n "$space" link set lo up
    ip -n "$space" link set cable up
done
# A cable carries a moment after both ends are up; UCX would not take it before.
for space in $a $b; do
    for ((tries = 0; tries < 100; tries++)); do
        if ip netns exec "$space" grep -q up /sys/class/net/cable/operstate; then break; fi
        sleep 0.05
    done
done

# What mpirun calls instead of ssh: `launch HOST COMMAND...` in the namespace of that host, with a host name of its own.
cat >"$work/launch" <<END
#!/usr/bin/env bash
while [[ \$1 == -* ]]; do shift; done
case \$1 in 10.77.0.1) space=$a ;; *) space=$b ;; esac
name=\$space
shift
exec ip netns exec "\$space" unshare --uts bash -c "hostname \$name; \$*"
END
chmod +x "$work/launch"
# Sockets alone, over the cable: shared memory would not be there between two hosts.
case $flavour in
openmpi)
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    start=(--mca plm_rsh_agent "$work/launch" --mca oob_tcp_if_include cable --mca pml ob1 --mca btl tcp,self
        --mca btl_tcp_if_include cable --oversubscribe --host 10.77.0.1:2,10.77.0.2:2)
    ;;
mpich)
    export UCX_TLS=tcp,self UCX_NET_DEVICES=cable
    start=(-launcher ssh -launcher-exec "$work/launch" -iface cable -hosts 10.77.0.1:2,10.77.0.2:2)
    ;;
esac
ip netns exec $a unshare --uts bash -c "hostname $a; exec timeout 100 \"\$@\"" _ "$(command -v mpirun.$flavour || command -v mpirun)" \
    "${start[@]}" -n 4 "$program" \
    run --backend mpi --input $input --mask causal --layout zigzag --ulysses 2 --ring 2 --backward --verify >"$work/log" 2>&1 || {
    cat "$work/log"
    exit 1
}
tail -8 "$work/log"
received=$(ip -n $a -s link show cable | awk '/RX:/ { getline; print $1 }')
echo "two hosts: $received bytes came over the cable"
((received > 1000000))

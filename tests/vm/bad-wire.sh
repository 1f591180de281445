#!/bin/sh
# bad-wire.sh PEER COUNT
#
# Two network namespaces with a wire between them that delays, loses, reorders, repeats and damages
# packets. Over each kind of wire COUNT messages go there and back and are compared. IP and TC say
# where those programs are.
set -eu
peer=$1 count=$2
server=10.213.7.1
ip() { "$IP" "$@"; }
tc() { "$TC" "$@"; }

ip netns add a
ip netns add b
ip -n a link add wire type veth peer name wire netns b
for host in a b; do
  [ $host = a ] && address=10.213.7.1 || address=10.213.7.2
  ip -n $host address add $address/24 dev wire
  ip -n $host link set lo up
  ip -n $host link set wire up
done

port=4000
wire() {
  echo "WIRE $*"
  for host in a b; do
    tc -n $host qdisc replace dev wire root netem limit 10000 "$@"
  done
  port=$((port + 1))
  ip netns exec a "$peer" echo way=Tcp listen=thalweg://$server:$port >/tmp/echo.$port &
  echo=$!
  while ! grep -qs LISTENING /tmp/echo.$port; do
    kill -0 $echo
    usleep 20000
  done
  ip netns exec b timeout 60 "$peer" check way=Tcp count=$count seed=$port \
    connect=thalweg://$server:$port
  tc -n b -s qdisc show dev wire | grep dropped
  kill $echo
  wait $echo 2>/dev/null || :
}

wire delay 2ms
wire delay 3ms 2ms
wire loss 2%
wire delay 2ms 1ms loss 3%
wire delay 4ms reorder 30% 50%
wire duplicate 5%
wire delay 1ms corrupt 1%

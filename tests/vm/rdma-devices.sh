# In the virtual machine: RDMA devices made of network interfaces.
#
# rxe0 talks to itself. Between rxa and rxb lies a wire, though both are here: their addresses are
# taken off the kernel's list of local ones for packets from one to the other, so that what is sent
# leaves by one end (va) and comes in by the other (vb).

. /tools
ip() { "$IP" "$@"; }

# A device, once its address is one by which it can be reached.
device() { # INTERFACE DEVICE ADDRESS
  echo 0 >/proc/sys/net/ipv6/conf/$1/accept_dad
  ip address add "$3/24" dev "$1"
  ip link set "$1" up
  "$RDMA" link add "$2" type rxe netdev "$1"
  tries=50
  until grep -qs ffff /sys/class/infiniband/$2/ports/1/gids/1; do
    tries=$((tries - 1))
    [ $tries -gt 0 ]
    usleep 100000
  done
}

ip link show dummy0 >/dev/null 2>&1 || ip link add dummy0 type dummy
ip link set dummy0 mtu 9000
device dummy0 rxe0 10.77.0.1

ip link add va mtu 9000 type veth peer name vb mtu 9000
echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
for end in va vb; do
  echo 1 >/proc/sys/net/ipv4/conf/$end/accept_local
  echo 0 >/proc/sys/net/ipv4/conf/$end/rp_filter
done
ip rule add pref 10 iif va lookup local
ip rule add pref 11 iif vb lookup local
ip rule add pref 20 from 10.78.0.1 to 10.78.0.2 lookup 200
ip rule add pref 21 from 10.78.0.2 to 10.78.0.1 lookup 200
ip rule add pref 100 lookup local
ip rule delete pref 0
device va rxa 10.78.0.1
device vb rxb 10.78.0.2
ip route add 10.78.0.2 dev va table 200
ip route add 10.78.0.1 dev vb table 200

# In the virtual machine: RDMA devices made of network interfaces.
#
# rxe0 talks to itself. Between rxa and rxb lies a wire, though both are here: their addresses are
# taken off the kernel's list of local ones for packets from one to the other, so that what is sent
# leaves by one end (va) and comes in by the other (vb). Between rxc and rxd lies another one.
#
# A wire keeps packets in order, and loses none of its own accord. The kernel's has a queue for each
# processor that sends, so that packets overtake each other, and drops what is more than a thousand;
# adapters then ask for things again and again. So there is one queue, and a long one.

. /tools
ip() { "$IP" "$@"; }

# A device, once its address is one by which it can be reached.
device() { # INTERFACE DEVICE ADDRESS
  echo 1 >/sys/class/net/$1/queues/rx-0/rps_cpus
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

echo 100000 >/proc/sys/net/core/netdev_max_backlog
ip link show dummy0 >/dev/null 2>&1 || ip link add dummy0 type dummy
ip link set dummy0 mtu 9000
device dummy0 rxe0 10.77.0.1

# Two devices with a wire between them.
wire() { # INTERFACE DEVICE INTERFACE DEVICE NETWORK NUMBER
  ip link add $1 mtu 9000 type veth peer name $3 mtu 9000
  for end in $1 $3; do
    echo 1 >/proc/sys/net/ipv4/conf/$end/accept_local
    echo 0 >/proc/sys/net/ipv4/conf/$end/rp_filter
    ip rule add pref 1$6 iif $end lookup local
  done
  ip rule add pref 2$6 from $5.1 to $5.2 lookup 20$6
  ip rule add pref 2$6 from $5.2 to $5.1 lookup 20$6
  device $1 $2 $5.1
  device $3 $4 $5.2
  ip route add $5.2 dev $1 table 20$6
  ip route add $5.1 dev $3 table 20$6
}

echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
ip rule add pref 100 lookup local
ip rule delete pref 0
wire va rxa vb rxb 10.78.0 0
wire vc rxc vd rxd 10.79.0 1

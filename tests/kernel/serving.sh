# For scripts in the virtual machine that run nbdsnap there, on the loopback
# interface, and attach its exports.

ADDRESS=127.0.0.1:10809

# wait_until COMMAND...: look again until it succeeds, for at most two minutes.
wait_until() {
    tries=1200
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || die "still waiting: $*"
        usleep 100000
    done
}

# serve ARGUMENT...: start the server, and wait for its exports. $server is its pid.
serve() {
    : >/tmp/exports
    nbdsnap serve --listen $ADDRESS "$@" >/tmp/exports 2>>/tmp/server.log &
    server=$!
    wait_until server_is_ready
}

server_is_ready() {
    kill -0 $server 2>/dev/null || die "the server ended: $(tail -3 /tmp/server.log)"
    grep -q "$ADDRESS\|127.0.0.1/" /tmp/exports
}

# The end without a warning, and the one that must go well.
kill_server() {
    kill -9 $server
    wait $server || true
}
stop_server() {
    kill -TERM $server
    wait $server || die "the server's end: $? $(tail -3 /tmp/server.log)"
}

# play_files SEED UNTIL NAME: files in /mnt/NAME, promised on the device lNAME.
# $player is its pid; it has made its first files when this returns.
play_files() {
    : >/tmp/play.$3
    file-player play $1 $2 /mnt/$3 /dev/mapper/l$3 >/tmp/play.$3 2>&1 &
    player=$!
    wait_until is_playing $3
}
is_playing() {
    grep -q playing /tmp/play.$1 && return 0
    ! grep file-player: /tmp/play.$1 || die "nothing is written in $1"
    return 1
}

# attach EXPORT N, detach N: as /dev/nbdN, with Debian's client.
attach() {
    wait_until is_free $2
    nbd-client -N $1 127.0.0.1 /dev/nbd$2 >/tmp/attach.log 2>&1 || die "nbd-client: $(cat /tmp/attach.log)"
}
detach() { nbd-client -d /dev/nbd$1 >/tmp/attach.log 2>&1 || die "nbd-client: $(cat /tmp/attach.log)"; }

# A detached device is free once the last who has it open has closed it.
is_free() { ! [ -e /sys/block/nbd$1/pid ]; }

# hold EXPORT N CONNECTIONS: the same with the suite's own client, which holds
# what is asked of the device while the server is away. $holder is its pid.
hold() {
    nbd-attach connect $2 $ADDRESS $1 $3 3 120 >/tmp/hold.$2 2>&1 &
    holder=$!
    wait_until is_held $2
}
is_held() {
    grep -q attached /tmp/hold.$1 && return 0
    ! grep nbd-attach: /tmp/hold.$1 || die "$1 is not attached"
    return 1
}

# checked NAME: the files in /mnt/NAME that were promised are there.
checked() {
    file-player check /mnt/$1 /dev/mapper/l$1 >/tmp/checked 2>&1 || die "$1: $(cat /tmp/checked)"
    say "checked.$1 $(cat /tmp/checked)"
}

# consistent DEVICE: nothing left to repair, with the journal replayed.
consistent() { e2fsck -fn "$1" >/tmp/e2fsck 2>&1 || die "e2fsck $1: $(cat /tmp/e2fsck)"; }

# For scripts in the virtual machine that follow the walkthroughs with the kernel's
# dmsetup and with nbdsnap. What each prints about its devices is kept in a file,
# with the numbers in common words.

. /test/serving.sh

# trace FILE PROGRAM: programs `dmsetup_traced` runs, and where it notes.
trace() {
    export TRACE=$1 TRACED=$2
    : >$TRACE
    rm -f $TRACE.major
}

# A server of nbdsnap without any disk, which takes orders.
serve_dm() {
    modprobe nbd
    nbdsnap serve --listen $ADDRESS >/tmp/exports 2>>/tmp/server.log &
    server=$!
    wait_until takes_orders
}
takes_orders() {
    kill -0 $server 2>/dev/null || die "the server ended: $(tail -3 /tmp/server.log)"
    nbdsnap dm ls >/dev/null 2>&1
}

# same WHAT: what both have printed, line by line.
same() {
    [ $(wc -l <$1.kernel) -gt 8 ] || die "$1: nothing was noted"
    diff $1.kernel $1.nbdsnap >/tmp/diff || {
        sed 's/^/differs: /' /tmp/diff
        die "$1: the kernel (-) and nbdsnap (+) print different things"
    }
    say same.${1#/tmp/} $(wc -l <$1.kernel)
}

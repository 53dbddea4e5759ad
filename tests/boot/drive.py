"""Drives the booted machine: installs, configures, breaks, upgrades; every step is checked.

Prints a transcript and keeps it in DIR/transcript.txt. Exits 0 only if every check held.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

WORK = sys.argv[1]
NODE = "gateway"
USER, PASSWORD = "gateway", "a password from a credential"
# Emulation on a busy machine is slow.
PATIENCE = 900
TEXT = "smoke from the gearbox"

started = time.monotonic()
transcript = open(f"{WORK}/transcript.txt", "w")


def say(text=""):
    for line in text.splitlines() or [""]:
        print(line, flush=True)
        transcript.write(line + "\n")
    transcript.flush()


def step(title):
    say(f"\n== {time.monotonic() - started:6.1f} s  {title}")


def check(what, good, *about):
    say(f"{'ok  ' if good else 'FAIL'}  {what}")
    if not good:
        raise SystemExit("\n".join(str(part) for part in about))


missed = []


def target(what, good):
    """A figure that is wanted; one that is missed fails the test at its end, not the steps behind it."""
    say(f"{'ok  ' if good else 'MISS'}  {what}")
    if not good:
        missed.append(what)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Machine:
    """The emulated machine, and a root shell in it."""

    def __init__(self):
        self.port = free_port()
        log = open(f"{WORK}/console.log", "wb")
        self.process = subprocess.Popen(
            ["qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a72", "-smp", "2", "-m", "2048", "-nographic",
             "-kernel", f"{WORK}/vmlinuz", "-initrd", f"{WORK}/initrd.gz",
             "-append", "console=ttyAMA0 rdinit=/sbin/init quiet",
             "-netdev", f"user,id=n0,hostfwd=tcp:127.0.0.1:{self.port}-:7000",
             "-device", "virtio-net-pci,netdev=n0,romfile=", "-no-reboot"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        self.wait(lambda: self.try_run("systemctl is-system-running | grep -E 'running|degraded'")[0] == 0)

    def try_run(self, script):
        """Exit status and output."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
                sock.sendall(script.encode() + b"\n__END__\n")
                out = b"".join(iter(lambda: sock.recv(65536), b"")).decode(errors="replace")
        except OSError as error:
            return 255, str(error)
        head, mark, status = out.rpartition("__STATUS__ ")
        return (int(status), head) if mark else (255, out)

    def run(self, script, show=True, good=True):
        """Output of a script that must succeed, unless `good` is false."""
        status, out = self.try_run(script)
        if show:
            say("\n".join(f"# {line}" for line in script.splitlines()))
            say(out.rstrip())
        check(f"`{script.splitlines()[0]}` ends with {status}", status == 0, out) if good and status else None
        return out

    def show(self, *names, unit="outpost"):
        out = self.run(f"systemctl show {unit} -p " + " -p ".join(names), show=False)
        return dict(line.split("=", 1) for line in out.splitlines())

    def wait(self, done, patience=PATIENCE):
        until = time.monotonic() + patience
        while not done():
            if self.process.poll() is not None:
                raise SystemExit("the machine has stopped: see console.log")
            if time.monotonic() > until:
                say(self.try_run("systemctl status outpost; journalctl -u outpost -n 40 --no-pager")[1])
                raise SystemExit("waited for too long")
            time.sleep(0.5)

    def wait_for(self, text, unit="outpost"):
        """Until the unit is active and its status text has `text`."""
        def done():
            state = self.show("ActiveState", "StatusText", unit=unit)
            return state["ActiveState"] == "active" and text in state["StatusText"]
        self.wait(done)


class Broker:
    """mosquitto on this side, which knows the machine by its password."""

    def __init__(self):
        self.port = free_port()
        passwords, conf = f"{WORK}/passwords", f"{WORK}/mosquitto.conf"
        subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, USER, PASSWORD], check=True, stderr=subprocess.DEVNULL)
        os.chmod(passwords, 0o644)
        with open(conf, "w") as file:
            file.write(f"listener {self.port} 127.0.0.1\nallow_anonymous false\npassword_file {passwords}\n"
                       "set_tcp_nodelay true\nmax_queued_messages 0\nlog_type error\nuser root\n")
        self.process = subprocess.Popen(["/usr/sbin/mosquitto", "-c", conf], stderr=subprocess.DEVNULL)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                break
            except OSError:
                time.sleep(0.1)
        self.replies, self.status = {}, {}
        self.sub = subprocess.Popen(
            ["mosquitto_sub", *self.at(), "-q", "1", "-v", "-t", "answers/#", "-t", "outpost/+/status"],
            stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self.listen, daemon=True).start()

    def at(self):
        return ["-V", "5", "-h", "127.0.0.1", "-p", str(self.port), "-u", USER, "-P", PASSWORD]

    def listen(self):
        for line in self.sub.stdout:
            topic, payload = line.split(" ", 1)
            message = json.loads(payload)
            if topic.startswith("answers/"):
                self.replies.setdefault(topic[8:], []).append(message)
            else:
                self.status[topic.split("/")[1]] = message

    def publish(self, jobs, pause=0.0, node=NODE):
        """Sends jobs in order in the background: (id, text)."""
        pub = subprocess.Popen(["mosquitto_pub", *self.at(), "-q", "1", "-l", "-t", f"outpost/{node}/jobs/text.classify"],
                               stdin=subprocess.PIPE, text=True)

        def feed():
            for id, text in jobs:
                pub.stdin.write(json.dumps({"id": id, "reply_to": f"answers/{id}", "input": {"text": text}}) + "\n")
                pub.stdin.flush()
                time.sleep(pause)
            pub.stdin.close()
            pub.wait()

        thread = threading.Thread(target=feed)
        thread.start()
        return thread

    def reply(self, id, patience=PATIENCE):
        until = time.monotonic() + patience
        while id not in self.replies:
            if time.monotonic() > until:
                return None
            time.sleep(0.05)
        return self.replies[id][0]

    def ask(self, id, show=True, node=NODE):
        self.publish([(id, TEXT)], node=node).join()
        reply = self.reply(id)
        if show:
            say(f"host: outpost/{node}/jobs/text.classify  {TEXT!r}\n  → {json.dumps(reply)}")
        return reply

    def all_answered(self, ids, what):
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and any(id not in self.replies for id in ids):
            time.sleep(0.2)
        lost = [id for id in ids if id not in self.replies]
        wrong = [id for id in ids if any(reply["status"] != "ok" for reply in self.replies.get(id, []))]
        twice = sum(len(self.replies.get(id, [])) > 1 for id in ids)
        check(f"{what}: {len(ids)} jobs, {len(lost)} lost, {len(wrong)} not ok, {twice} replies seen twice",
              not lost and not wrong, lost[:5], [self.replies[id] for id in wrong[:3]])


def memory(machine, key):
    pid = machine.show("MainPID")["MainPID"]
    return int(re.search(rf"{key}:\s+(\d+)", machine.run(f"cat /proc/{pid}/status", show=False))[1]) / 1024


def start_ms(machine):
    times = machine.show("ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    return (int(times["ActiveEnterTimestampMonotonic"]) - int(times["ExecMainStartTimestampMonotonic"])) / 1e3


def restarts(machine):
    return int(machine.show("NRestarts")["NRestarts"])


def drive(machine, broker):
    step("install: it asks nothing, and says what is missing")
    machine.run("uname -srm; . /etc/os-release; echo $PRETTY_NAME; systemctl --version | head -1")
    machine.run("DEBIAN_FRONTEND=noninteractive apt-get install -q -y -o Dpkg::Use-Pty=0 ./first.deb </dev/null")
    machine.wait_for("no broker is configured")
    check("nothing was restarted", restarts(machine) == 0)
    machine.run("systemctl status outpost --no-pager -n 6", good=False)
    say(f"cold start, no broker: {start_ms(machine):.0f} ms to READY=1")
    out = machine.run("outpost check", good=False)
    check("`outpost check` says what to do", "none is configured" in out and "→ say in broker.url" in out, out)
    machine.run("man -w outpost outpost-run; ls /usr/share/bash-completion/completions/outpost")

    step("configure by file and credential")
    machine.run(f"""cat > /etc/outpost/outpost.toml <<'EOF'
[broker]
url = "mqtt://10.0.2.2:{broker.port}"
username = "{USER}"
password_credential = "mqtt-password"
EOF
install -m 600 /dev/stdin /etc/outpost/credentials/mqtt-password <<'EOF'
{PASSWORD}
EOF
mkdir -p /etc/systemd/system/outpost.service.d
cat > /etc/systemd/system/outpost.service.d/local.conf <<'EOF'
[Service]
LoadCredential=mqtt-password:/etc/outpost/credentials/mqtt-password
# Shorter than the package's, so that this test is as well.
WatchdogSec=8s
EOF
systemctl daemon-reload
systemctl restart outpost""")
    machine.wait_for("online at")
    machine.run("systemctl status outpost --no-pager -n 5")
    say(f"cold start, subscribed: {start_ms(machine):.0f} ms to READY=1")
    reply = broker.ask("first")
    check("answered on the device", reply["status"] == "ok" and reply["by"]["tier"] == "device", reply)

    step("no root, no capabilities, little exposure")
    pid = machine.show("MainPID")["MainPID"]
    out = machine.run(f"ps -o user=,comm= -p {pid} 2>/dev/null || stat -c '%U outpost' /proc/{pid}\ngrep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/{pid}/status")
    check("it is not root and has no capability", "root" not in out and "CapEff:\t0000000000000000" in out, out)
    out = machine.run("systemd-analyze security outpost.service --no-pager | tail -1")
    check("exposure is at most 1.5", float(re.search(r": ([\d.]+)", out)[1]) <= 1.5, out)
    out = machine.run("systemd-analyze verify outpost.service outpost@second.service; echo verified")
    check("verify has nothing to say of our units", "outpost" not in out, out)
    say(f"resident, three models: {memory(machine, 'VmRSS'):.1f} MiB (at most {memory(machine, 'VmHWM'):.1f})")

    step("the journal has the fields")
    out = machine.run("journalctl -u outpost -o json --no-pager | tail -400", show=False)
    entries = [json.loads(line) for line in out.splitlines()]
    active = [entry for entry in entries if entry.get("MESSAGE", "").startswith("active")]
    wanted = ["PRIORITY", "SYSLOG_IDENTIFIER", "CODE_FILE", "CODE_LINE", "OUTPOST_MODEL", "OUTPOST_TASK", "OUTPOST_VARIANT"]
    say(json.dumps({key: active[-1].get(key) for key in ["MESSAGE", *wanted]}))
    check("an entry has them all", all(key in active[-1] for key in wanted), active[-1])
    out = machine.run("journalctl OUTPOST_MODEL=digits@1.0.0 --no-pager -o cat | tail -1")
    check("entries are found by model", "digits@1.0.0" in out, out)

    step("a worker that stands still trips the watchdog")
    pid, before = machine.show("MainPID")["MainPID"], restarts(machine)
    machine.run(f"""cd /proc/{pid}/task; for t in *; do echo $t $(cat $t/comm); done
tid=$(grep -l outpost-run-0 */comm | cut -d/ -f1); systemd-run --quiet --unit=freeze /root/freeze $tid; echo froze $tid""")
    broker.publish([("frozen", TEXT)]).join()
    machine.wait(lambda: restarts(machine) > before)
    machine.wait_for("online at")
    machine.run("journalctl -u outpost --no-pager -o cat -n 40 | grep -iE 'stuck|watchdog|scheduled restart|signal'")
    reply = broker.reply("frozen")
    check("the job that waited meanwhile is answered", reply is not None and reply["status"] == "ok", reply)

    step("kill -STOP of a worker, which stops the whole process")
    pid, before = machine.show("MainPID")["MainPID"], restarts(machine)
    machine.run(f"tid=$(cd /proc/{pid}/task; grep -l outpost-run-1 */comm | cut -d/ -f1); kill -STOP $tid; echo stopped $tid")
    machine.wait(lambda: restarts(machine) > before)
    machine.wait_for("online at")
    check("it answers again", broker.ask("after-stop")["status"] == "ok")

    step("kill -9 under load")
    before = restarts(machine)
    ids = [f"kill-{n}" for n in range(300)]
    feeding = broker.publish([(id, TEXT) for id in ids], pause=0.01)
    broker.reply("kill-50")
    machine.run("systemctl kill -s KILL outpost; sleep 1; systemctl show outpost -p ActiveState -p Result -p NRestarts")
    feeding.join()
    machine.wait_for("online at")
    check("it was started again", restarts(machine) == before + 1)
    broker.all_answered(ids, "killed under load")

    step("reload: another set of models, no restart")
    pid = machine.show("MainPID")["MainPID"]
    machine.run("""rm /var/lib/outpost/models/notes
cp -r /usr/share/outpost/models/digits /var/lib/outpost/models/broken
sed -i 's/^name = .*/name = "broken"/; s/sha256 = "./sha256 = "f/' /var/lib/outpost/models/broken/model.toml
systemctl reload outpost; sleep 1
while [ "$(systemctl show outpost -p ActiveState --value)" = reloading ]; do sleep 1; done
journalctl -u outpost --no-pager -o cat -n 12""")
    machine.wait_for("2 models (1 refused)")
    reply = broker.ask("no-notes")
    check("the model is gone", reply["status"] == "error" and reply["error"]["code"] == "above_capability", reply)
    machine.run("""rm -r /var/lib/outpost/models/broken; systemd-tmpfiles --create outpost.conf
systemctl reload outpost""")
    machine.wait_for("3 models,")
    check("and back", broker.ask("notes-again")["status"] == "ok")
    machine.run("""sed -i 's/^url/urll/' /etc/outpost/outpost.toml; systemctl reload outpost; sleep 3
sed -i 's/^urll/url/' /etc/outpost/outpost.toml; printf '[jobs]\\nqueue = 99\\n' >> /etc/outpost/outpost.toml
systemctl reload outpost; sleep 3; sed -i '/^.jobs.$/,$d' /etc/outpost/outpost.toml
journalctl -u outpost --no-pager -o cat -n 30 | grep -E 'not reloaded|need a restart'""")
    check("all the while it was one process", machine.show("MainPID")["MainPID"] == pid)

    step("reload by itself when the folder of models changes")
    machine.run("""cp /usr/share/doc/outpost/examples/outpost-reload.* /etc/systemd/system/
systemctl daemon-reload; systemctl start outpost-reload.path; rm /var/lib/outpost/models/notes""")
    machine.wait_for("2 models,")
    machine.run("systemd-tmpfiles --create outpost.conf")
    machine.wait_for("3 models,")
    check("still one process", machine.show("MainPID")["MainPID"] == pid)
    machine.run("systemctl stop outpost-reload.path", show=False)

    step("stop under load loses nothing")
    ids = [f"stop-{n}" for n in range(600)]
    feeding = broker.publish([(id, TEXT) for id in ids], pause=0.003)
    broker.reply("stop-50")
    machine.run("time systemctl stop outpost; systemctl show outpost -p ActiveState -p Result -p ExecMainStatus")
    answered = sum(id in broker.replies for id in ids)
    feeding.join()
    say(f"{answered} of {len(ids)} had been answered when it stopped; status: {broker.status[NODE]['state']}")
    machine.run("systemctl start outpost")
    broker.all_answered(ids, "stopped under load")

    step("upgrade in mid-load, and back")
    machine.run("sed -i '1i # a change of the user' /etc/outpost/outpost.toml", show=False)
    for deb, wanted in [("second", "-2"), ("first", "-1")]:
        ids = [f"{deb}-{n}" for n in range(1500)]
        old = machine.show("MainPID")["MainPID"]
        feeding = broker.publish([(id, TEXT) for id in ids], pause=0.01)
        broker.reply(f"{deb}-50")
        machine.run(f"DEBIAN_FRONTEND=noninteractive apt-get install -y --allow-downgrades ./{deb}.deb </dev/null | tail -4")
        feeding.join()
        machine.wait(lambda: machine.show("MainPID")["MainPID"] not in ("0", old))
        machine.wait_for("online at")
        out = machine.run("dpkg-query -W outpost; head -1 /etc/outpost/outpost.toml")
        check("the version is the new one, the configuration the user's", wanted in out and "a change of the user" in out, out)
        broker.all_answered(ids, f"to {deb} under load")

    step("one model")
    machine.run("rm /var/lib/outpost/models/digits /var/lib/outpost/models/bearing; systemctl restart outpost")
    machine.wait_for("1 models,")
    check("it answers", broker.ask("one-model", show=False)["status"] == "ok")
    rss = memory(machine, "VmRSS")
    say(f"cold start, one model: {start_ms(machine):.0f} ms to READY=1")
    # Files of a system in memory count as shared.
    own = memory(machine, "RssAnon")
    target(f"resident, idle with one model: {rss:.1f} MiB ({own:.1f} of its own, the rest of the binary), at most 20", rss <= 20)

    step("several nodes on one machine")
    machine.run(f"""sed '1i [node]\\nname = "second"' /etc/outpost/outpost.toml > /etc/outpost/second.toml
mkdir -p /etc/systemd/system/outpost@.service.d
cp /etc/systemd/system/outpost.service.d/local.conf /etc/systemd/system/outpost@.service.d/
systemctl daemon-reload; systemctl start outpost@second""")
    machine.wait_for("online at", unit="outpost@second")
    reply = broker.ask("second-node", node="second")
    check("the second node answers", reply["status"] == "ok", reply)
    machine.run("ls -d /var/lib/outpost/nodes/second/*; systemctl stop outpost@second")

    step("a configuration that cannot be used is not tried again and again")
    machine.run("sed -i 's/^url/urll/' /etc/outpost/outpost.toml; systemctl restart outpost", good=False)
    time.sleep(6)
    state = machine.show("ActiveState", "ExecMainStatus", "NRestarts", "StatusText")
    say(str(state))
    check("failed with 78, once", (state["ActiveState"], state["ExecMainStatus"]) == ("failed", "78"), state)
    check("and says why", "did you mean `url`" in state["StatusText"], state)

    step("removed and installed again it starts")
    machine.run("""sed -i 's/^urll/url/' /etc/outpost/outpost.toml
DEBIAN_FRONTEND=noninteractive apt-get remove -y outpost </dev/null | tail -1
DEBIAN_FRONTEND=noninteractive apt-get install -y ./first.deb </dev/null | tail -1""")
    machine.wait_for("online at")
    machine.run("systemctl stop outpost; DEBIAN_FRONTEND=noninteractive apt-get install -y ./second.deb </dev/null | tail -1; sleep 2")
    check("one that was stopped stays so at an upgrade", machine.show("ActiveState")["ActiveState"] == "inactive")

    step("purge leaves nothing")
    machine.run("DEBIAN_FRONTEND=noninteractive apt-get purge -y outpost </dev/null | tail -3")
    out = machine.run("ls -d /var/lib/outpost /usr/bin/outpost /usr/share/outpost /etc/outpost/outpost.toml; systemctl is-enabled outpost", good=False)
    check("nothing is there", out.count("No such file or directory") >= 4, out)


def main():
    step("boot")
    broker = Broker()
    machine = Machine()
    say(f"booted in {time.monotonic() - started:.1f} s")
    try:
        drive(machine, broker)
        machine.try_run("systemctl poweroff")
        machine.process.wait(60)
        if missed:
            raise SystemExit("; ".join(missed))
        say(f"\nall held, {time.monotonic() - started:.0f} s")
    finally:
        for process in (machine.process, broker.sub, broker.process):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


try:
    main()
except SystemExit as failed:
    say(f"\nFAILED: {failed}")
    raise

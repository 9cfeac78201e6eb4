//! The command line as scripts use it: documents, exit codes, refusals that say what to do.

use serde_json::Value;
use std::process::Command;
use xsan_tests::cluster::{outcome, program};
use xsan_tests::{Cluster, Outcome};

const INVALID: i32 = 2;
const NOT_FOUND: i32 = 4;
const EXISTS: i32 = 5;
const UNAVAILABLE: i32 = 7;

fn assert_fields(document: &Value, fields: &[&str]) {
    let object = document.as_object().unwrap_or_else(|| panic!("an object, not {document}"));
    for field in fields {
        assert!(object.contains_key(*field), "field {field} in {document}");
    }
}

/// A refusal has this code, tells why on stderr, prints nothing else and no backtrace.
fn assert_refused(outcome: &Outcome, code: i32, about: &str) {
    assert_eq!(outcome.code, code, "{about}: {outcome:?}");
    assert!(!outcome.stderr.trim().is_empty(), "{about}: why? {outcome:?}");
    assert!(outcome.stdout.is_empty(), "{about}: nothing but the error: {outcome:?}");
    assert!(!outcome.stderr.contains("panicked"), "{about}: {outcome:?}");
}

#[test]
fn documents_have_their_fields() {
    let cluster = Cluster::started();
    let volume = cluster.ok(&["volume", "create", "vm1", "--size", "1GiB"]);
    let fields = ["name", "id", "pool", "size", "ack", "state", "reason", "clients", "generation", "uri", "engine"];
    assert_fields(&volume, &fields);
    assert_eq!((&volume["name"], &volume["size"]), (&Value::from("vm1"), &Value::from(1 << 30)));
    assert_eq!(cluster.ok(&["volume", "stat", "vm1"])["id"], volume["id"]);
    let persisted = cluster.ok(&["volume", "create", "vm2", "--size", "1", "--ack", "persisted"]);
    assert_eq!((&persisted["ack"], &persisted["size"]), (&Value::from("persisted"), &Value::from(4096)), "rounded up");
    let list = cluster.ok(&["volume", "list"]);
    let names: Vec<_> = list.as_array().expect("a list").iter().map(|volume| volume["name"].clone()).collect();
    assert_eq!(names, ["vm1", "vm2"]);

    let status = cluster.status();
    let fields =
        ["health", "reasons", "cluster", "single_host", "epoch", "version", "nbd", "nodes", "pools", "volumes"];
    assert_fields(&status, &fields);
    assert_fields(&status["counters"], &["device_read_bytes", "device_write_bytes", "corrupt_found"]);
    assert_eq!((&status["health"], &status["single_host"]), (&Value::from("ok"), &Value::from(true)));
    let nodes = cluster.ok(&["node", "list"]);
    assert_eq!(nodes.as_array().map(Vec::len), Some(6));
    assert_fields(&nodes[0], &["name", "state", "since_millis", "device", "capacity", "used", "shards", "failed"]);
    let pools = cluster.ok(&["pool", "list"]);
    assert_fields(&pools[0], &["name", "scheme", "placement_groups", "tolerates", "positions_down", "volumes"]);
    assert_eq!((&pools[0]["tolerates"], &pools[0]["volumes"]), (&Value::from(2), &Value::from(2)));

    cluster.ok(&["pool", "create", "--ec", "2+1"]);
    cluster.ok(&["pool", "create", "fast", "--replicas", "3"]);
    let in_pool = cluster.ok(&["volume", "create", "vm3", "--size", "1GiB", "--pool", "fast"]);
    assert_eq!(in_pool["pool"], "fast");
    assert_refused(&cluster.run(&["pool", "delete", "fast"]), INVALID, "a pool with volumes stays");
    cluster.ok(&["volume", "delete", "vm3", "--yes"]);
    cluster.ok(&["pool", "delete", "fast"]);
}

#[test]
fn refusals_have_their_exit_codes() {
    let cluster = Cluster::started();
    cluster.create_volume("vm1", "64MiB");
    cluster.create_volume("vm2", "64MiB");
    let table: &[(&[&str], i32)] = &[
        (&["volume", "stat", "nope"], NOT_FOUND),
        (&["volume", "resize", "nope", "--size", "1GiB"], NOT_FOUND),
        (&["volume", "rename", "nope", "other"], NOT_FOUND),
        (&["volume", "delete", "nope", "--yes"], NOT_FOUND),
        (&["volume", "create", "vm3", "--size", "1GiB", "--pool", "nope"], NOT_FOUND),
        (&["pool", "delete", "nope"], NOT_FOUND),
        (&["node", "stop", "n7"], NOT_FOUND),
        (&["node", "start", "n7"], NOT_FOUND),
        (&["volume", "create", "vm1", "--size", "1GiB"], EXISTS),
        (&["volume", "rename", "vm1", "vm2"], EXISTS),
        (&["pool", "create", "default", "--replicas", "2"], EXISTS),
        (&["node", "start", "n1"], INVALID),
        (&["volume", "create", "vm3", "--size", "many"], INVALID),
        (&["volume", "create", "vm3", "--size", "-1"], INVALID),
        (&["volume", "create", "vm3", "--size", "0"], INVALID),
        (&["volume", "create", "vm3", "--size", "99999999999999TiB"], INVALID),
        (&["volume", "create", "vm3", "--size", "15EiB"], INVALID),
        (&["volume", "create", "vm3"], INVALID),
        (&["volume", "create", "vm3", "--size", "1GiB", "--ack", "never"], INVALID),
        (&["volume", "create", "", "--size", "1GiB"], INVALID),
        (&["volume", "create", "a/b", "--size", "1GiB"], INVALID),
        (&["volume", "create", "a b", "--size", "1GiB"], INVALID),
        (&["volume", "create", "ümlaut", "--size", "1GiB"], INVALID),
        (&["volume", "create", "..", "--size", "1GiB"], INVALID),
        (&["volume", "resize", "vm1", "--size", "1MiB"], INVALID),
        (&["volume", "resize", "vm1", "--size", "0", "--shrink"], INVALID),
        (&["pool", "create", "wide", "--ec", "8+3"], UNAVAILABLE),
        (&["pool", "create", "wide", "--ec", "0+2"], INVALID),
        (&["pool", "create", "wide", "--ec", "4"], INVALID),
        (&["pool", "create", "wide", "--replicas", "7"], UNAVAILABLE),
        (&["pool", "create", "wide"], INVALID),
        (&["volume", "delete", "vm1"], INVALID),
        (&["nonsense"], INVALID),
        (&["volume", "stat", "../../status"], NOT_FOUND),
        (&["volume", "delete", "a/b?c#d", "--yes"], NOT_FOUND),
    ];
    for (arguments, code) in table {
        assert_refused(&cluster.run(arguments), *code, &format!("{arguments:?}"));
    }
    let long = "x".repeat(1000);
    assert_refused(&cluster.run(&["volume", "create", &long, "--size", "1GiB"]), INVALID, "a long name");
    let names = cluster.ok(&["volume", "list"]);
    assert_eq!(names.as_array().map(Vec::len), Some(2), "nothing was changed: {names}");
    let refused = cluster.run(&["volume", "delete", "vm1"]);
    assert!(refused.stderr.contains("--yes"), "how to delete without a terminal: {refused:?}");

    cluster.ok(&["node", "stop", "n6"]);
    assert_refused(&cluster.run(&["node", "stop", "n6"]), INVALID, "stopped already");
}

#[test]
fn a_directory_belongs_to_one_process_and_keeps_its_nodes() {
    let mut cluster = Cluster::new(&["--device-size", "2GiB", "--nodes", "3"]);
    cluster.start();
    assert_eq!(cluster.status()["nodes"].as_array().map(Vec::len), Some(3));
    let second = outcome(&mut cluster.command());
    assert_refused(&second, UNAVAILABLE, "a second process on the directory");
    assert!(cluster.runs(), "the first one is not disturbed");
    assert_eq!(cluster.status()["health"], "ok");
    cluster.stop();

    let dir = cluster.dir();
    let dev = |options: &[&str]| outcome(Command::new(program()).args(["dev", "--dir"]).arg(&dir).args(options));
    let wrong = dev(&["--nodes", "6"]);
    assert_refused(&wrong, INVALID, "another number of nodes");
    assert!(wrong.stderr.contains("--nodes 3"), "it says how: {wrong:?}");
    for options in [&["--nodes", "0"][..], &["--nodes", "65"], &["--device-size", "x"], &["--listen", "nowhere"]] {
        let fresh = cluster.dir().with_extension("fresh");
        let refused = outcome(Command::new(program()).args(["dev", "--dir"]).arg(&fresh).args(options));
        assert_refused(&refused, INVALID, &format!("{options:?}"));
    }
    cluster.start();
    assert_eq!(cluster.status()["health"], "ok");
}

#[test]
fn without_a_server_the_answer_is_unavailable() {
    let mut cluster = Cluster::new(&["--device-size", "2GiB"]);
    assert_refused(&cluster.run(&["status"]), UNAVAILABLE, "never started");
    cluster.start();
    cluster.kill();
    let refused = cluster.run(&["status"]);
    assert_refused(&refused, UNAVAILABLE, "a socket that nobody serves");
    assert!(refused.stderr.contains("xsan dev"), "it says what to do: {refused:?}");
    cluster.start();
    let unnamed = outcome(Command::new(program()).args(["status"]).env_remove("XSAN_ADMIN"));
    assert_refused(&unnamed, INVALID, "no socket named");
    let by_environment =
        outcome(Command::new(program()).arg("status").env("XSAN_ADMIN", cluster.dir().join("admin.sock")));
    assert_eq!(by_environment.code, 0, "{by_environment:?}");
}

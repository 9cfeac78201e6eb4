//! `xsan node drain` and `xsan device add|remove|replace`: data that moves, watched until it is there.

use super::{DeviceCommand, Failure, Output, fetch, output, volume};
use crate::admin::api::{
    AddDevice, AddedDevice, ClusterStatus, DeviceInfo, Done, DrainNode, RemoveDevice, RemovedDevice,
};
use crate::admin::client::Client;
use crate::error::ClusterError;
use hyper::Method;
use std::io::{IsTerminal, Write};
use std::time::Duration;
use xsan_env::os;

/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

pub(super) async fn drain(
    client: &Client,
    name: &str,
    cancel: bool,
    no_wait: bool,
    output: Output,
) -> Result<(), Failure> {
    let path = format!("/v1/nodes/{name}/drain");
    let done: Done = client.call(Method::POST, &path, &DrainNode { cancel }).await?;
    if cancel {
        output::done(output, &done, &format!("node {name} holds data again; its share moves back by itself"));
        return Ok(());
    }
    if !no_wait {
        let is_left = |status: &ClusterStatus| {
            let node = status.nodes.iter().find(|node| node.name == name);
            node.is_some_and(|node| node.devices.iter().any(|device| device.state == "leaving"))
        };
        watch(client, is_left).await?;
    }
    let text = if no_wait { "is being emptied: watch it with `xsan status`" } else { "is empty and may be unplugged" };
    output::done(output, &done, &format!("node {name} {text}"));
    Ok(())
}

pub(super) async fn device(client: &Client, command: DeviceCommand, output: Output) -> Result<(), Failure> {
    match command {
        DeviceCommand::List => unreachable!("done before"),
        DeviceCommand::Add { path } => {
            let added = add(client, path, None).await?;
            output::done(output, &added, &format!("device {} added; its share of the data moves there", added.device));
        }
        DeviceCommand::Remove { device, yes, no_wait } => {
            let found = find(client, &device).await?;
            let outcome = remove(client, &found.id, give_up(&found, yes)?, no_wait).await?;
            let text = match outcome {
                RemovedDevice::Removed => format!("device {device} removed; its disk may be taken out"),
                RemovedDevice::Leaving => format!("device {device} is being emptied: give the command again later"),
            };
            output::done(output, &outcome, &text);
        }
        DeviceCommand::Replace { device, path, yes, no_wait } => {
            let found = find(client, &device).await?;
            let (lost, old) = (give_up(&found, yes)?, found.id);
            let added = add(client, path, Some(old.clone())).await?;
            let outcome = remove(client, &old, lost, no_wait).await?;
            let text = match outcome {
                RemovedDevice::Removed => format!("device {} has taken the place of {old}", added.device),
                RemovedDevice::Leaving => format!("device {old} is being emptied: `xsan device remove {old}` later"),
            };
            output::done(output, &added, &text);
        }
    }
    Ok(())
}

async fn add(client: &Client, path: std::path::PathBuf, replaces: Option<String>) -> Result<AddedDevice, Failure> {
    // The daemon may stand elsewhere in the file system than this command.
    let path = std::path::absolute(path).map_err(ClusterError::io("device"))?;
    Ok(client.call(Method::POST, "/v1/devices", &AddDevice { path, replaces }).await?)
}

/// Whether the device is to be given up: if it is missing, and that is what is wanted.
fn give_up(device: &DeviceInfo, yes: bool) -> Result<bool, Failure> {
    if device.missing {
        let id = &device.id;
        volume::confirm(
            yes,
            &format!("Give device {id} up? It is missing; what only it holds is lost, also if it returns."),
        )?;
    }
    Ok(device.missing)
}

async fn remove(client: &Client, device: &str, lost: bool, no_wait: bool) -> Result<RemovedDevice, Failure> {
    let path = format!("/v1/devices/{device}");
    loop {
        let outcome: RemovedDevice = client.call(Method::DELETE, &path, &RemoveDevice { lost }).await?;
        if outcome == RemovedDevice::Removed || no_wait {
            return Ok(outcome);
        }
        let leaves = |info: &DeviceInfo| info.id == device && info.state == "leaving";
        watch(client, |status: &ClusterStatus| status.nodes.iter().flat_map(|node| &node.devices).any(leaves)).await?;
    }
}

/// A device by its id, of which the beginning is enough.
async fn find(client: &Client, begin: &str) -> Result<DeviceInfo, Failure> {
    let status = fetch(client).await?;
    let devices = status.nodes.iter().flat_map(|node| &node.devices);
    let found: Vec<&DeviceInfo> = devices.filter(|device| device.id.starts_with(begin)).collect();
    match found[..] {
        [device] => Ok(device.clone()),
        [] => Err(ClusterError::NoDevice(begin.to_owned()).into()),
        _ => Err(Failure::Usage(format!("several devices begin with {begin:?}"), Some("name more of it".into()))),
    }
}

/// Shows what moves, on stderr, for as long as `goes_on` says so.
async fn watch(client: &Client, goes_on: impl Fn(&ClusterStatus) -> bool) -> Result<(), Failure> {
    let env = os::OsRuntime::current();
    let is_terminal = std::io::stderr().is_terminal();
    let mut last = String::new();
    loop {
        let status = fetch(client).await?;
        if !goes_on(&status) {
            if is_terminal && !last.is_empty() {
                eprintln!();
            }
            return Ok(());
        }
        let lines: Vec<String> = status.moves.iter().map(output::moving).collect();
        let line =
            if lines.is_empty() { "waiting for the cluster to plan the move".to_owned() } else { lines.join("; ") };
        if is_terminal {
            eprint!("\r\x1b[K{line}");
            let _ = std::io::stderr().flush();
        } else if line != last {
            eprintln!("{line}");
        }
        last = line;
        env.sleep(LOOK_EVERY).await;
    }
}

//! The shard index. The engine has no way to open a database without changing it, so a copy is opened.

use super::output::line;
use super::{Failure, unreadable};
use serde::Serialize;
use std::io;
use std::path::{Path, PathBuf};
use xsan_env::Env;
use xsan_node::format::Extent;
use xsan_node::{FjallIndex, ShardIndex};
use xsan_types::{ShardId, VolumeId};

/// Entries read at once.
const PAGE: usize = 1024;

#[derive(Serialize)]
pub(super) struct IndexReport {
    /// A whole one shows every shard of its device; another one is filled again when its node opens it.
    whole: bool,
    shards: Vec<IndexedShard>,
    /// Why the list ends before its end.
    fault: Option<String>,
}

#[derive(Serialize)]
pub(super) struct IndexedShard {
    shard: ShardId,
    bytes: u64,
    allocation: u64,
    extents: Vec<Extent>,
}

/// Removes the copy when it goes.
struct Copy(PathBuf);

impl Drop for Copy {
    fn drop(&mut self) {
        // What stays behind lies in the directory for temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn copy_all(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_all(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

pub(super) async fn index_report(env: &Env, dir: &Path, volume: Option<VolumeId>) -> Result<IndexReport, Failure> {
    if !dir.join("keyspaces").is_dir() {
        let next = "the shard index of a device of `xsan dev` is DIR/n1/index".to_owned();
        return Err(Failure::Usage(format!("{} is no shard index", dir.display()), Some(next)));
    }
    let copy = Copy(std::env::temp_dir().join(format!("xsan-debug-index-{:x}", env.random())));
    copy_all(dir, &copy.0).map_err(|error| unreadable(dir, &error))?;
    let index = FjallIndex::open(env, copy.0.clone()).await.map_err(|error| {
        let next = "its node sets a damaged index aside at the next start and makes it anew from the device".to_owned();
        Failure::Usage(format!("{}: {error}", dir.display()), Some(next))
    })?;
    let mut report = IndexReport { whole: !index.is_new(), shards: Vec::new(), fault: None };
    let mut after = None;
    loop {
        let page = match volume {
            Some(volume) => index.volume_page(volume, after, PAGE),
            None => index.page(after, PAGE),
        };
        match page {
            Ok(page) => {
                let Some((last, _)) = page.last() else { return Ok(report) };
                after = Some(*last);
                report.shards.extend(page.into_iter().map(|(shard, entry)| {
                    let (bytes, allocation, extents) = (entry.bytes, entry.allocation, entry.extents);
                    IndexedShard { shard, bytes, allocation, extents }
                }));
            }
            Err(error) => {
                report.fault = Some(error.to_string());
                return Ok(report);
            }
        }
    }
}

impl IndexReport {
    pub(super) fn print(&self) {
        for IndexedShard { shard, bytes, allocation, extents } in &self.shards {
            let at = extents.first().map_or(0, |extent| extent.offset);
            line!("{shard} @{at}, {bytes} bytes in {} extents, allocation {allocation}", extents.len());
        }
        let state = if self.whole { "shows the whole device" } else { "was never filled" };
        line!("{} shards; the index {state}", self.shards.len());
        if let Some(fault) = &self.fault {
            line!("DAMAGE, the list ends here: {fault}");
        }
    }
}

//! What a load of a snapshot can say, and what the snapshot has settled.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::operations;
use api_spec::snapshot::SnapshotLoad;
use api_spec::stats::{VcpuStats, VmStats};
use api_spec::vm::InstanceState;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tests::{Restore, Template, TemplateOptions, Vm, require};

/// The guide's section on loads.
fn guide() -> &'static str {
    let text = include_str!("../../docs/operations.md");
    let (_, rest) =
        text.split_once("`PUT /snapshot/load` takes:\n").expect("the guide has the table of a load's fields");
    rest
}

/// Words in backticks.
fn names(text: &str) -> BTreeSet<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

#[test]
fn the_guide_lists_just_the_fields_that_a_load_takes() {
    let (operation, _) = operations::find("PUT", "/snapshot/load").expect("there is the call");
    let shape = operation.body.expect("it takes a body");
    let schema = api_spec::openapi::schema(&shape);
    let taken: BTreeSet<&str> =
        schema["schema"]["properties"].as_object().expect("it has fields").keys().map(String::as_str).collect();
    let rows = guide().lines().skip(3).take_while(|line| line.starts_with('|'));
    let listed = rows.flat_map(|row| names(row.split('|').nth(1).unwrap_or_default())).collect();
    assert_eq!(taken, listed);
}

#[test]
fn what_a_snapshot_settles_cannot_be_changed_by_a_load() {
    require!(Kvm);
    let template = Template::make(TemplateOptions { vcpus: 1, memory_mib: 16, working_set_mib: 1 });
    let (_, rest) = guide().split_once("everything else that the snapshot settles:").expect("the guide lists it");
    let settled = names(rest.split_once("Make a template").expect("the list ends").0);
    assert!(settled.len() > 10, "{settled:?}");
    let mut vm = tests::vm::waiting(&template.place, "clone");
    for field in settled {
        let refused =
            vm.api().put("/snapshot/load", &json!({ "snapshot_path": template.snapshot, field: Value::Null }));
        let refused = refused.expect_err("the snapshot settles it").to_string();
        assert!(refused.contains(&format!("unknown field `{field}`")), "{refused}");
    }
    assert_eq!(vm.state(), InstanceState::NotStarted);
    let mut load = SnapshotLoad::of(template.snapshot.clone());
    load.resume_vm = true;
    load.vsock_override = Some(api_spec::snapshot::VsockOverride { uds_path: vm.vsock.clone() });
    vm.api().put("/snapshot/load", &load).expect("nothing of it was done");
    template.facts.check(&mut vm.agent());
    vm.stop();
}

/// How often any vCPU has left the guest.
fn exits(vm: &mut Vm) -> u64 {
    let stats: VmStats = vm.api().get("/vm/stats").expect("a VM that was started has counters");
    let all = |vcpu: &VcpuStats| {
        let VcpuStats { io_in, io_out, mmio_read, mmio_write, interrupted, other, failures } = *vcpu;
        io_in + io_out + mmio_read + mmio_write + interrupted + other + failures
    };
    stats.vcpus.iter().map(all).sum()
}

#[test]
fn a_clone_that_is_loaded_paused_does_nothing_until_it_is_resumed() {
    require!(Kvm);
    let template = Template::make(TemplateOptions { vcpus: 2, memory_mib: 16, working_set_mib: 1 });
    let mut vm = Restore::new(&template.place, &template.snapshot).paused().by_api().start("clone");
    assert_eq!((vm.state(), exits(&mut vm)), (InstanceState::Paused, 0));
    // Looking at it changes nothing.
    for path in ["/", "/vm/config", "/vm/stats", "/vm/memory-map", "/machine-config"] {
        let _: Value = vm.api().get(path).expect("it is told");
    }
    assert_eq!((vm.state(), exits(&mut vm)), (InstanceState::Paused, 0));
    vm.resume();
    template.facts.check(&mut vm.agent());
    assert!(exits(&mut vm) > 0);
    vm.stop();
}

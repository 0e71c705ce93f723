use super::*;

fn balloon(amount_mib: u64) -> Balloon {
    Balloon {
        amount_mib,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_reporting: true,
        free_page_hinting: false,
    }
}

fn interface(iface_id: &str, tap: &str, mac: Option<&str>) -> NetworkInterface {
    NetworkInterface {
        iface_id: iface_id.into(),
        host_dev_name: tap.into(),
        guest_mac: mac.map(|mac| mac.parse().unwrap()),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
        mtu: None,
    }
}

fn good() -> VmConfig {
    VmConfig {
        boot_source: Some(BootSource { embedded_guest: true, ..Default::default() }),
        machine_config: MachineConfig {
            vcpu_count: 8,
            mem_size_mib: 8,
            max_private_mib: Some(4),
            ..Default::default()
        },
        vsock: Some(Vsock { guest_cid: 3, uds_path: "/run/v".into(), vsock_id: None }),
        drives: vec![drive("data"), Drive { is_root_device: true, ..drive("root") }, drive("more")],
        network_interfaces: vec![interface("eth0", "tap0", Some("06:00:ac:10:00:02")), interface("eth1", "tap1", None)],
        entropy: Some(Entropy::default()),
        serial: None,
        balloon: Some(balloon(8)),
        ..Default::default()
    }
}

fn drive(id: &str) -> Drive {
    serde_json::from_value(serde_json::json!({ "drive_id": id, "path_on_host": "/d" })).unwrap()
}

#[test]
fn the_root_disk_comes_first() {
    let ids: Vec<String> = plan(&good()).unwrap().devices.drives.into_iter().map(|drive| drive.drive_id).collect();
    assert_eq!(ids, ["root", "data", "more"]);
}

#[test]
fn each_bad_disk_is_refused_by_name() {
    let with = |change: fn(&mut VmConfig)| {
        let mut config = good();
        change(&mut config);
        plan(&config).unwrap_err()
    };
    let id = || "data".to_owned();
    assert_eq!(with(|c| c.drives[2].drive_id = "data".into()), DriveError::Duplicate(id()).into());
    assert_eq!(with(|c| c.drives[0].is_root_device = true), DriveError::TwoRoots(id(), "root".into()).into());
    let roots = ["a", "b"].map(|id| Drive { is_root_device: true, ..drive(id) });
    let [a, b] = roots;
    let second = with_drive(std::slice::from_ref(&a), b);
    assert_eq!(second, Err(DriveError::TwoRoots("a".into(), "b".into()).into()));
    assert_eq!(with_drive(std::slice::from_ref(&a), a.clone()), Ok(vec![a]), "it replaces itself");
    assert_eq!(with(|c| c.drives[0].io_engine = IoEngine::Async), DriveError::Async(id()).into());
    assert_eq!(with(|c| c.drives[0].max_overlay_mib = Some(0)), DriveError::NoOverlay(id()).into());
    for uuid in ["0b-1", "", "a b", "a\"b"] {
        let mut config = good();
        config.drives[0].partuuid = Some(uuid.into());
        assert_eq!(plan(&config), Err(DriveError::Partuuid(id()).into()), "{uuid}: it is no root");
        config.drives[1].partuuid = config.drives[0].partuuid.take();
        assert_eq!(plan(&config).is_ok(), uuid == "0b-1", "{uuid}");
    }
    let mut sealed = Drive { is_read_only: true, overlay: true, ..drive("data") };
    assert_eq!(check_drive(&sealed), Err(DriveError::ReadOnly(id(), "overlay").into()));
    (sealed.overlay, sealed.max_overlay_mib) = (false, Some(5));
    assert_eq!(check_drive(&sealed), Err(DriveError::ReadOnly(id(), "max_overlay_mib").into()));
    assert!(matches!(with(|c| c.drives[0].drive_id = "a/b".into()), ConfigError::Id { .. }));
    let many = with(|c| c.drives = (0..18).map(|n| drive(&n.to_string())).collect());
    assert_eq!(many, ConfigError::TooMany(23));
}

#[test]
fn only_the_bound_of_an_overlay_can_be_changed() {
    let update = |path_on_host, mib: Option<u64>| DriveUpdate {
        drive_id: "a".into(),
        path_on_host,
        max_overlay_mib: mib.map(Some),
        rate_limiter: None,
    };
    let check = |update: &DriveUpdate| with_drive_update(&[drive("b"), drive("a")], update);
    assert_eq!(check(&update(None, Some(7))), Ok(Drive { max_overlay_mib: Some(7), ..drive("a") }));
    let bounded = [Drive { max_overlay_mib: Some(7), ..drive("a") }];
    let lifted = DriveUpdate { max_overlay_mib: Some(None), ..update(None, None) };
    assert_eq!(with_drive_update(&bounded, &lifted), Ok(drive("a")));
    assert_eq!(check(&update(None, None)), Err(DriveError::NoChange("a".into()).into()));
    assert_eq!(check(&update(None, Some(0))), Err(DriveError::NoOverlay("a".into()).into()));
    assert_eq!(check(&update(Some("/x".into()), Some(7))), Err(DriveError::Path("a".into()).into()));
    let refused = |drives: &[Drive]| with_drive_update(drives, &update(None, Some(7))).unwrap_err();
    assert_eq!(refused(&[drive("b")]), DriveError::Unknown("a".into()).into());
    let sealed = Drive { is_read_only: true, ..drive("a") };
    assert_eq!(refused(&[sealed]), DriveError::ReadOnly("a".into(), "max_overlay_mib").into());
}

#[test]
fn bounds_that_are_not_given_stay_as_they_were() {
    let bucket = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 5 });
    let limiter = |bandwidth, ops| Some(RateLimiter { bandwidth, ops });
    let limited = Drive { rate_limiter: limiter(bucket(1), bucket(2)), ..drive("a") };
    let update =
        |rate_limiter| DriveUpdate { drive_id: "a".into(), path_on_host: None, max_overlay_mib: None, rate_limiter };
    let updated = with_drive_update(&[limited], &update(limiter(None, bucket(3)))).unwrap();
    assert_eq!(updated.rate_limiter, limiter(bucket(1), bucket(3)));
    assert!(matches!(
        with_drive_update(&[drive("a")], &update(limiter(bucket(0), None))),
        Err(ConfigError::Rate(field)) if field == "drives.a.rate_limiter.bandwidth"
    ));
    let eth0 = NetworkInterface { tx_rate_limiter: limiter(bucket(1), None), ..interface("eth0", "tap0", None) };
    let update = |iface_id: &str, rx_rate_limiter| NetworkUpdate {
        iface_id: iface_id.into(),
        rx_rate_limiter,
        tx_rate_limiter: None,
    };
    let interfaces = [eth0.clone()];
    let updated = with_network_update(&interfaces, &update("eth0", limiter(bucket(4), None))).unwrap();
    assert_eq!(updated, NetworkInterface { rx_rate_limiter: limiter(bucket(4), None), ..eth0 });
    let refused = with_network_update(&interfaces, &update("eth1", None));
    assert_eq!(refused, Err(ConfigError::NoInterface("eth1".into())));
}

#[test]
fn a_machine_is_changed_field_by_field() {
    let machine = MachineConfig { mem_size_mib: 64, max_private_mib: Some(5), ..Default::default() };
    let patch = MachinePatch { vcpu_count: Some(2), ..Default::default() };
    assert_eq!(with_machine(&machine, patch), Ok(MachineConfig { vcpu_count: 2, ..machine.clone() }));
    let lifted = MachinePatch { max_private_mib: Some(None), ..Default::default() };
    assert_eq!(with_machine(&machine, lifted), Ok(MachineConfig { max_private_mib: None, ..machine.clone() }));
    assert_eq!(with_machine(&machine, MachinePatch::default()), Err(ConfigError::NoChange));
    let wrong = MachinePatch { vcpu_count: Some(9), ..Default::default() };
    assert_eq!(with_machine(&machine, wrong), Err(ConfigError::Vcpus(9)));
    assert_eq!(check_machine_update(lifted), Ok(Some(None)));
    assert_eq!(check_machine_update(patch), Err(ConfigError::Fixed { field: "vcpu_count" }));
    assert_eq!(check_machine_update(MachinePatch::default()), Err(ConfigError::NoChange));
}

#[test]
fn a_good_configuration_is_planned() {
    let plan = plan(&good()).unwrap();
    assert_eq!((plan.vcpus, plan.memory_bytes, plan.kernel), (8, 8 << 20, Kernel::Embedded));
}

#[test]
fn each_bad_value_is_refused_by_name() {
    let with = |change: fn(&mut VmConfig)| {
        let mut config = good();
        change(&mut config);
        plan(&config).unwrap_err()
    };
    assert_eq!(with(|c| c.machine_config.vcpu_count = 0), ConfigError::Vcpus(0));
    assert_eq!(with(|c| c.machine_config.vcpu_count = 9), ConfigError::Vcpus(9));
    assert_eq!(with(|c| c.machine_config.mem_size_mib = 7), ConfigError::Memory(7));
    assert_eq!(with(|c| c.machine_config.mem_size_mib = u64::MAX), ConfigError::Memory(u64::MAX));
    assert_eq!(with(|c| c.machine_config.max_private_mib = Some(0)), ConfigError::MaxPrivate);
    assert_eq!(with(|c| c.boot_source = None), ConfigError::NoKernel);
    assert_eq!(with(|c| c.boot_source = Some(BootSource::default())), ConfigError::NoKernel);
    let both = with(|c| c.boot_source.as_mut().unwrap().kernel_image_path = Some("k".into()));
    assert_eq!(both, ConfigError::TwoKernels);
    let initrd = with(|c| c.boot_source.as_mut().unwrap().initrd_path = Some("i".into()));
    assert_eq!(initrd, ConfigError::EmbeddedInitrd);
    assert_eq!(with(|c| c.vsock.as_mut().unwrap().guest_cid = 2), ConfigError::GuestCid(2));
    let consoles =
        with(|c| c.serial = Some(Serial { serial_out_path: Some("f".into()), pty: true, rate_limiter: None }));
    assert_eq!(consoles, ConfigError::TwoConsoles);
    let large = with(|c| c.balloon = Some(balloon(9)));
    assert_eq!(large, ConfigError::Balloon { amount_mib: 9, memory_mib: 8 });
    assert_eq!(check_interval(0, 0), Ok(()));
    assert_eq!(check_interval(0, 1), Err(ConfigError::NoStatistics));
    assert_eq!(check_interval(1, 0), Err(ConfigError::Interval));
    for id in ["", "a/b", "a b", &"x".repeat(65)] {
        assert!(check_id("drives.drive_id", id).is_err(), "{id}");
    }
    assert_eq!(check_id("drives.drive_id", "root-1_A"), Ok(()));
    let ops = Some(TokenBucket { size: 1, one_time_burst: None, refill_time: 0 });
    let rate_limiter = Some(RateLimiter { bandwidth: None, ops });
    assert_eq!(check_entropy(&Entropy { rate_limiter }), Err(ConfigError::Rate("entropy.rate_limiter.ops".into())));
    for name in ["", "a b", "a/b", "a:b", "tap%d", ".", "..", "sixteen-bytes-xx", "tap\u{e4}"] {
        let refused = check_network(&[interface("e", name, None)]);
        assert_eq!(refused, Err(ConfigError::TapName { iface_id: "e".into(), tap: name.into() }));
    }
    let mac = Some("06:00:ac:10:00:02");
    for (other, field) in [
        (interface("eth0", "t", None), "iface_id"),
        (interface("e", "tap1", None), "host_dev_name"),
        (interface("e", "t", mac), "guest_mac"),
    ] {
        let mut interfaces = good().network_interfaces;
        interfaces.push(other);
        assert!(matches!(check_network(&interfaces), Err(ConfigError::TwoInterfaces { field: f, .. }) if f == field));
    }
    let many: Vec<_> = (0..9).map(|n| interface(&format!("e{n}"), &format!("t{n}"), None)).collect();
    assert_eq!(check_network(&many), Err(ConfigError::TooManyInterfaces(9)));
    let long = with(|c| c.vsock.as_mut().unwrap().uds_path = "x".repeat(108).into());
    assert!(matches!(long, ConfigError::UdsPath(_)));
}

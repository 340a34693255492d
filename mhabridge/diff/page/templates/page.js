"use strict";
// Saving the numbers, and opening what differs before the page is printed.
(() => {
  const button = document.getElementById("download");
  button.hidden = false;
  document.getElementById("plain").hidden = true;
  button.addEventListener("click", () => {
    const data = JSON.parse(document.getElementById("report").textContent);
    const address = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" }));
    const link = Object.assign(document.createElement("a"), { href: address, download: "mhabridge-diff.json" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
  });

  const PICTURES = 24; // more would be a book
  let opened = [];
  addEventListener("beforeprint", () => {
    const layers = [...document.querySelectorAll("details.layer.off, details.layer.broken, details.diagnosis")];
    const pictures = [...document.querySelectorAll("details.picture[data-verdict=off], details.picture[data-verdict=broken]")];
    const wanted = new Set([...layers, ...pictures.slice(0, PICTURES)]);
    for (const details of layers) {
      for (let at = details.parentElement.closest("details"); at; at = at.parentElement.closest("details")) wanted.add(at);
    }
    opened = [...wanted].filter((details) => !details.open);
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
    opened = [];
  });
})();
